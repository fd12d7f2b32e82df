"""Compares the engine on quantised checkpoints with transformers on the dequantised weights.

    python -m compiledllm.benchmarks.quantised CHECKPOINT FOLDER TEXT

FOLDER: the output of `make_quantised.py`. The compressed-tensors library dequantises each
checkpoint, and transformers computes with these weights in float32; the engine computes in float32
with the quantised weights. Prints a table: perplexity of TEXT's first tokens, and the largest
difference of a token's log probability. Exits with 1 if a perplexity differs from transformers' by
more than MAX_DIFFERENCE.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compiledllm import Engine, SamplingParams

MAX_DIFFERENCE = 0.002  # of perplexities, relative
_COLUMNS = ("checkpoint", "perplexity", "transformers", "difference", "max logprob", "16 bits")


@dataclass(frozen=True, slots=True)
class Row:
    """Log probabilities [tokens - 1] of the text: the engine's, and transformers'."""

    name: str
    ours: Tensor
    reference: Tensor

    @property
    def difference(self) -> float:
        return perplexity(self.ours) / perplexity(self.reference) - 1

    def cells(self, plain: Tensor) -> list[str]:
        """plain: transformers' log probabilities with the 16-bit weights."""
        apart = (self.ours - self.reference).abs().max().item()
        change = perplexity(self.ours) / perplexity(plain) - 1
        numbers = f"{perplexity(self.ours):.4f}", f"{perplexity(self.reference):.4f}"
        return [self.name, *numbers, f"{self.difference:+.5%}", f"{apart:.1e}", f"{change:+.1%}"]


def perplexity(logprobs: Tensor) -> float:
    return math.exp(-logprobs.double().mean().item())


def engine_logprobs(checkpoint: Path, token_ids: list[int]) -> Tensor:
    """The engine's log probabilities of the tokens after the first: float32 [tokens - 1]."""
    length = len(token_ids) + 1
    engine = Engine(checkpoint, dtype="float32", max_model_len=length, skip_tokenizer_init=True)
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    found = engine.generate([{"prompt_token_ids": token_ids}], params)[0].prompt_logprobs
    assert found is not None
    pairs = zip(found[1:], token_ids[1:], strict=True)
    return torch.tensor([entry[token_id].logprob for entry, token_id in pairs if entry])


def transformers_logprobs(model: Any, token_ids: list[int]) -> Tensor:
    """transformers' log probabilities of the tokens after the first: float32 [tokens - 1]."""
    ids = torch.tensor([token_ids])
    with torch.inference_mode():
        logprobs: Tensor = model(ids).logits[0, :-1].float().log_softmax(-1)
    return logprobs.gather(1, ids[0, 1:, None])[:, 0]


def put_dequantised(model: Any, checkpoint: Path) -> None:
    """Give transformers' model the checkpoint's weights, dequantised in float32."""
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils import match_named_modules
    from safetensors.torch import load_file

    stored = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(stored)
    tensors = load_file(checkpoint / "model.safetensors")
    model.load_state_dict({n: t for n, t in tensors.items() if t.is_floating_point()}, strict=False)
    for scheme in config.config_groups.values():
        for name, module in match_named_modules(model, scheme.targets, config.ignore):
            found = {n: t for n, t in tensors.items() if n.startswith(f"{name}.")}
            parts = {n.removeprefix(f"{name}."): t for n, t in found.items()}
            format = scheme.format or config.format
            module.weight.data.copy_(_dequantise(parts, scheme, getattr(format, "value", format)))


def _dequantise(parts: dict[str, Tensor], scheme: Any, format: str) -> Tensor:
    """The library's matrix, computed in float32 where the library computes in 16 bits."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    scale = parts["weight_scale"]
    if format == "nvfp4-pack-quantized":
        packed = parts["weight_packed"]
        n, k = packed.shape[0], packed.shape[1] * 2
        codes = unpack_fp4_from_uint8(packed, n, k, dtype=torch.float32)
        factor = parts["weight_global_scale"]
        product: Tensor = dequantize(codes, scale.float(), args=scheme.weights, global_scale=factor)
        return product
    if scale.dtype in (torch.bfloat16, torch.float16):
        parts["weight_scale"] = scale.float()
    compressor = BaseCompressor.get_value_from_registry(format)
    weight: Tensor = compressor.decompress(parts, scheme)["weight"]
    return weight.float()


def table(rows: list[Row], plain: Tensor) -> str:
    lines = [_COLUMNS, ["---"] * len(_COLUMNS), *(row.cells(plain) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> int:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    parser = argparse.ArgumentParser(prog="compiledllm.benchmarks.quantised")
    parser.add_argument("checkpoint", type=Path, help="the 16-bit checkpoint")
    parser.add_argument("folder", type=Path, help="a directory of quantised checkpoints")
    parser.add_argument("text", type=Path)
    parser.add_argument("--num-tokens", type=int, default=1024)
    arguments = parser.parse_args()
    text = arguments.text.read_text(encoding="utf-8")
    token_ids = AutoTokenizer.from_pretrained(arguments.checkpoint)(text).input_ids
    token_ids = token_ids[: arguments.num_tokens]
    model = AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype=torch.float32)
    plain = transformers_logprobs(model, token_ids)
    rows = [Row("16 bits", engine_logprobs(arguments.checkpoint, token_ids), plain)]
    for checkpoint in sorted(arguments.folder.iterdir()):
        put_dequantised(model, checkpoint)
        reference = transformers_logprobs(model, token_ids)
        rows.append(Row(checkpoint.name, engine_logprobs(checkpoint, token_ids), reference))
    print(table(rows, plain))
    return int(any(abs(row.difference) > MAX_DIFFERENCE for row in rows))


if __name__ == "__main__":
    sys.exit(main())
