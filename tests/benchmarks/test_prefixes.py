"""The measurement of the prefix cache, at a tiny size, and that it saves what it should."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from compiledllm.benchmarks import prefixes
from tests.support.families import IN_ENGINE, VARIANTS

SIZES = {
    "chat-len": 600, "answer-len": 20, "turn-len": 30, "shared-len": 300, "num-prompts": 6,
    "input-len": 100, "output-len": 8, "num-iters": 1, "num-kv-blocks": 400,
}  # fmt: skip


def test_a_chat_computes_its_new_tokens_and_others_take_no_step_more(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    shape = VARIANTS["lfm2", IN_ENGINE["lfm2"]] | {"max_position_embeddings": 2048}
    model, file = tiny_model("lfm2", **shape), tmp_path / "report.json"
    sizes = [word for name, size in SIZES.items() for word in (f"--{name}", str(size))]
    fixed = ["--device", "cpu", "--dtype", "float32", "--enforce-eager", "--output-json", str(file)]
    prefixes.main([str(model), *sizes, *fixed])
    chat, shared, apart = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert chat["tokens"] == 650 and chat["new"] < chat["computed"] <= chat["new"] + 16
    assert chat["steps"] == 1 and chat["restored"] == 1
    assert 300 - 16 < shared["cached"] <= 300
    on, off = apart["counts"]["on"], apart["counts"]["off"]
    assert on["kept"] == 6 and not off["kept"]
    assert on["steps"] == off["steps"], "keeping states takes no steps"
