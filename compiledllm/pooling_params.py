"""How a prompt's hidden states become one vector. Field names are vLLM's where vLLM has them.

Pure Python (no torch), importable from everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from compiledllm.checks import is_int, require, strict_fields

PoolingKind = Literal["last", "mean"]


@strict_fields("pooling field")
@dataclass(frozen=True, slots=True)
class PoolingParams:
    """What vector a prompt gets. None stands for what the checkpoint says.

    kind: "last", the hidden state of the prompt's last token; "mean", the mean over all its tokens.
    normalize: scale the vector to length 1. dimensions: keep this many leading values, before
        normalising; models trained for it (Matryoshka) lose little.
    truncate_prompt_tokens: keep this many tokens from the end of the prompt; -1: as many as fit.
    skip_reading_prefix_cache: compute the whole prompt. A mean always does, because cached tokens
        have no hidden states.

    Raises ValueError naming the field, the value and the range.
    """

    kind: PoolingKind | None = None
    normalize: bool | None = None
    dimensions: int | None = None
    truncate_prompt_tokens: int | None = None
    skip_reading_prefix_cache: bool = False

    def __post_init__(self) -> None:
        keep, size = self.truncate_prompt_tokens, self.dimensions
        require(self.kind in (None, "last", "mean"), "kind", self.kind, "'last' or 'mean'")
        ok = self.normalize is None or isinstance(self.normalize, bool)
        require(ok, "normalize", self.normalize, "True, False or None")
        ok = isinstance(self.skip_reading_prefix_cache, bool)
        name = "skip_reading_prefix_cache"
        require(ok, name, self.skip_reading_prefix_cache, "True or False")
        ok = size is None or (is_int(size) and size >= 1)
        require(ok, "dimensions", size, "an integer >= 1 or None")
        ok = keep is None or (is_int(keep) and (keep == -1 or keep >= 1))
        require(ok, "truncate_prompt_tokens", keep, "an integer >= 1, -1 or None")
