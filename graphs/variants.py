"""The variants in which blocks and edges are compiled, each for a range of token counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Variant:
    """A compilation for steps of `min_tokens` to `max_tokens` tokens, traced with `example` tokens.

    The compiler tunes its kernels for the example: a kernel tuned for 2 tokens is slow for
    thousands.
    """

    min_tokens: int
    max_tokens: int
    example: int


_ANY = 2**30  # tokens, more than any step has
_CPU_VARIANTS = (Variant(1, 1, 1), Variant(2, _ANY, 2))
_GPU_VARIANTS = (
    Variant(1, 1, 1),
    Variant(2, 16, 8),
    Variant(17, 256, 64),
    Variant(257, _ANY, 2048),
)


def variants_for(max_tokens: int, on_gpu: bool) -> list[Variant]:
    """The variants that steps of at most `max_tokens` need.

    The last variant ends at `max_tokens`, because the compiler uses 32-bit indices only if the
    bound proves that they suffice.
    """
    found = []
    for v in _GPU_VARIANTS if on_gpu else _CPU_VARIANTS:
        if v.min_tokens <= max_tokens:
            # A range of a single token count would make the shape static.
            limit = min(v.max_tokens, max(max_tokens, v.min_tokens + 1))
            found.append(Variant(v.min_tokens, limit, min(v.example, limit)))
    return found


def edge_variants(variants: Sequence[Variant]) -> dict[Variant, Variant]:
    """The variants of the edges, keyed by the block's variant with the same example.

    Edges need two variants only, one token and any number of tokens: their kernels are equally good
    for few and many tokens, and each variant adds to the start-up time.
    """
    few = dict(zip(variants[:2], variants[:2], strict=True))
    last = variants[:2][-1]
    return few | {last: replace(last, max_tokens=variants[-1].max_tokens)}
