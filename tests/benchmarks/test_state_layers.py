"""The measurement of state layers' ops, at a tiny size."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from compiledllm.benchmarks import state_layers


def test_every_op_and_step_has_a_row(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    options = ["--rows", "2", "--prompts", "1x3", "--layers", "1", "--output-json", str(file)]
    state_layers.main(options)
    report = json.loads(file.read_text(encoding="utf-8"))
    found = [(row["op"], row["rows"], row["count"], row.get("state")) for row in report["rows"]]
    assert found == [
        (op, *step, state)
        for step in ((2, 1), (1, 3))
        for op, state in (
            ("gated_delta_rule", "float32"),
            ("short_convolution", None),
            ("state_space", "float32"),
            ("gated_delta_rule", "bfloat16"),
        )
    ]
    assert all(row["us"] > 0 and row["share_of_copy_rate"] > 0 for row in report["rows"])


def test_a_decode_step_moves_its_states_twice() -> None:
    shape = state_layers.Shape()
    num_bytes, _ = state_layers.delta_rule_cost(shape, state_layers.Step(64, 1), torch.float32)
    states = 2 * 64 * 32 * 128 * 128 * 4
    assert states < num_bytes < 1.01 * states
