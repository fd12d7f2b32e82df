"""Makes a model's linear layers, embeddings and norms in their weight formats."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from compiledllm.kernels.linear import linear
from compiledllm.models.formats.mixed import mixed
from compiledllm.models.formats.plain import Plain
from compiledllm.models.formats.quantized import Quantized
from compiledllm.models.formats.weight_format import WeightFormat
from compiledllm.models.layers.linear import (
    WHOLE,
    Division,
    Embedding,
    ExpertLinear,
    Head,
    Linear,
)
from compiledllm.models.layers.norm import make_norm, rms_norm
from compiledllm.models.matrices import Formats, MixedSpec
from compiledllm.models.shards import Ranks, Shard
from compiledllm.models.spec import NormSpec


@dataclass(frozen=True, slots=True)
class Products:
    """The kernels for products with unquantised matrices and for RMSNorm.

    linear: (x, weight, bias, out) -> y, as `kernels.linear.linear`. rms_norm: (x, weight, eps).
    """

    linear: Callable[..., Tensor] = linear
    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm


@dataclass(frozen=True, slots=True)
class Factory:
    """Makes the linear layers and norms of a model.

    formats: the formats of the quantised matrices, as in a LayerSpec or ModelSpec. prefix: the path
    of the module whose parts the factory makes: "", "attn.", "mlp.shared.". ranks: this process's
    rank among the ranks of a tensor-parallel model.
    """

    products: Products = Products()
    formats: Formats = ()
    prefix: str = ""
    ranks: Ranks = Ranks()

    def within(self, module: str) -> Factory:
        """The factory for the parts of a module."""
        return replace(self, prefix=f"{self.prefix}{module}.")

    def linear(
        self,
        name: str,
        in_features: int,
        parts: dict[str, int],
        bias: bool = False,
        division: Division = WHOLE,
    ) -> Linear:
        """A layer with all its outputs on every rank, unless a division says otherwise."""
        return Linear(in_features, parts, bias, self._format(name), division=division)

    def experts(
        self,
        name: str,
        count: int,
        in_features: int,
        parts: dict[str, int],
        bias: bool,
        num_unnamed: int = 0,
        division: Division = WHOLE,
    ) -> ExpertLinear:
        format = self._format(name)
        return ExpertLinear(count, in_features, parts, bias, format, num_unnamed, division)

    def by_outputs(
        self,
        parts: Mapping[str, int],
        sections: Mapping[str, tuple[int, ...]] | None = None,
        replicas: Mapping[str, int] | None = None,
    ) -> Division:
        """The division that gives each rank a share of the outputs of each part.

        parts: part -> the rank's number of outputs. sections: part -> the rank's size of each of
        the sections that the part consists of; other parts have one section. replicas: part ->
        number of neighbouring ranks that hold the same outputs.
        """
        if not self.ranks.are_many:
            return WHOLE
        sections, replicas = sections or {}, replicas or {}
        shards = {
            part: self.ranks.shard(*sections.get(part, (size,)), replicas=replicas.get(part, 1))
            for part, size in parts.items()
        }
        return Division(self.ranks, shards)

    def by_inputs(self, in_features: int) -> Division:
        """The division that gives each rank `in_features` of the inputs."""
        if not self.ranks.are_many:
            return WHOLE
        return Division(self.ranks, inputs=self.ranks.shard(in_features))

    def are_alike(self, name: str, other: str) -> bool:
        """Whether two matrices have the same format."""
        formats = dict(self.formats)
        return formats.get(self.prefix + name) == formats.get(self.prefix + other)

    def head(
        self,
        in_features: int,
        num_rows: int,
        bias: bool,
        embedding: Embedding | None,
        rows: Shard,
    ) -> Head:
        """The output head. embedding: the embedding of a tied head; None: the head is not tied.

        rows: the rank's rows of the vocabulary, which are `num_rows` with padding.
        """
        format = self._format("lm_head" if embedding is None else "embedding")
        return Head(in_features, num_rows, bias, format, embedding, self._by_rows(rows))

    def embedding(
        self, name: str, num_rows: int, width: int, rows: Shard | None = None
    ) -> Embedding:
        """A table of rows. rows: as for `head`; None: each rank has the whole table."""
        division = WHOLE if rows is None else self._by_rows(rows)
        return Embedding(num_rows, width, self._format(name), division)

    def _by_rows(self, rows: Shard) -> Division:
        return Division(self.ranks, {"": rows}) if self.ranks.are_many else WHOLE

    def norm(self, spec: NormSpec, *shape: int) -> nn.Module:
        """The module of a NormSpec. shape: the shape of its weight."""
        return make_norm(spec, shape, self.products.rms_norm)

    def _format(self, name: str) -> WeightFormat:
        spec = dict(self.formats).get(self.prefix + name)
        if isinstance(spec, MixedSpec):
            return mixed(spec, self.products.linear)
        return Plain(self.products.linear) if spec is None else Quantized(spec)
