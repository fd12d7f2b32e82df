"""The quantization_config that `models.gguf` writes for a converted GGUF file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from compiledllm.models.formats.codes import QuantizedMatrix
from compiledllm.models.formats.gguf_blocks import KINDS, from_gguf
from compiledllm.models.formats.stored import Fields, Stored

METHOD = "gguf"  # value of quant_method
BLOCKS = "_blocks"  # ends the name of a tensor of blocks, uint8 [N, bytes of a row]


def gguf(fields: Fields, _scale_dtype: str) -> GgufScheme:
    """The scheme of a converted GGUF file, whose matrices are stored in GGUF types.

    Fields: kinds, name of a matrix -> its type. dequantized, type -> how many tensors and numbers
    of the type were dequantised, because the engine has no packed layout for them; for reports.
    """
    kinds = fields.section("kinds").texts()
    for name, kind in kinds.items():
        if kind not in KINDS:
            raise fields.section("kinds").refusal(name, kind, f"supported: {', '.join(KINDS)}")
    dequantized = {
        kind: (counts.integer("tensors"), counts.integer("numbers"))
        for kind, counts in fields.section("dequantized").sections().items()
    }
    return GgufScheme(_title(kinds, dequantized), kinds)


@dataclass(frozen=True)
class GgufScheme:
    title: str
    kinds: Mapping[str, str]
    suffixes: tuple[str, ...] = (BLOCKS,)

    def stored(self, name: str) -> Stored | None:
        kind = self.kinds.get(name)
        return None if kind is None else _STORED[kind]


def _title(kinds: Mapping[str, str], dequantized: Mapping[str, tuple[int, int]]) -> str:
    """For reports: "gguf Q4_K x 20, Q6_K x 8; dequantised: IQ3_S x 2 (3.1 MiB)"."""
    packed = Counter(kinds.values())
    counts = ", ".join(f"{kind} x {count}" for kind, count in sorted(packed.items()))
    title = f"gguf {counts or 'without packed matrices'}"
    if not dequantized:
        return title
    others = ", ".join(
        f"{kind} x {tensors} ({2 * numbers / 2**20:.1f} MiB)"
        for kind, (tensors, numbers) in sorted(dequantized.items())
    )
    return f"{title}; dequantised to 16 bits: {others}"


def _read(kind: str, tensors: Mapping[str, Tensor]) -> QuantizedMatrix:
    return from_gguf(tensors[BLOCKS[1:]], kind)


_STORED = {
    name: Stored(kind.spec, ((BLOCKS,),), partial(_read, name)) for name, kind in KINDS.items()
}
