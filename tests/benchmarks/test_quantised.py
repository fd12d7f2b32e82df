"""The comparison with transformers on quantised checkpoints, on files of the tests' writers."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from compiledllm.benchmarks.quantised import (
    engine_logprobs,
    perplexity,
    put_dequantised,
    transformers_logprobs,
)
from tests.support.greedy import load_reference
from tests.support.quantized import save_quantized

pytestmark = pytest.mark.skipif(
    find_spec("compressed_tensors") is None, reason="needs compressed-tensors"
)
KINDS = ["packed 4 bits, asymmetric", "int8", "float of channels", "nvfp4"]


@pytest.mark.parametrize("kind", KINDS)
def test_reference_has_the_weights_that_the_file_stands_for(
    kind: str, tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_model("llama", hidden_size=64)
    packed, dense = save_quantized(source, tmp_path, kind)
    model = load_reference(source)
    put_dequantised(model, packed)
    for name, weight in load_reference(dense).state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=1e-6, atol=0)


def test_log_probabilities_are_those_of_the_same_tokens(
    tiny_model: Callable[..., Path], tmp_path: Path
) -> None:
    packed, dense = save_quantized(tiny_model("llama", hidden_size=64), tmp_path, "int8")
    token_ids = torch.randint(0, 128, (20,)).tolist()
    expected = transformers_logprobs(load_reference(dense), token_ids)
    actual = engine_logprobs(packed, token_ids)
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-4)
    assert perplexity(torch.full((3,), 0.5).log()) == pytest.approx(2)
