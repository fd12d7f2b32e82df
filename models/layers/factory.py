"""Makes a model's linear layers and norms, with their weight formats and the chosen kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from compiledllm.kernels.linear import linear
from compiledllm.models.formats.mixed import mixed
from compiledllm.models.formats.plain import Plain
from compiledllm.models.formats.quantized import Quantized
from compiledllm.models.formats.weight_format import WeightFormat
from compiledllm.models.layers.linear import ExpertLinear, Head, Linear
from compiledllm.models.layers.norm import make_norm, rms_norm
from compiledllm.models.matrices import Formats, MixedSpec
from compiledllm.models.spec import NormSpec


@dataclass(frozen=True, slots=True)
class Products:
    """The kernels of products with unquantised matrices and of RMSNorm.

    linear: (x, weight, bias, out) -> y, as `kernels.linear.linear`. rms_norm: (x, weight, eps).
    """

    linear: Callable[..., Tensor] = linear
    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm


@dataclass(frozen=True, slots=True)
class Factory:
    """Makes the linear layers and norms of a model.

    formats: the formats of the quantised matrices, as in a LayerSpec or ModelSpec. prefix: the path
    of the module whose parts the factory makes: "", "attn.", "mlp.shared.".
    """

    products: Products = Products()
    formats: Formats = ()
    prefix: str = ""

    def within(self, module: str) -> Factory:
        """The factory for the parts of a module."""
        return replace(self, prefix=f"{self.prefix}{module}.")

    def linear(
        self, name: str, in_features: int, parts: dict[str, int], bias: bool = False
    ) -> Linear:
        return Linear(in_features, parts, bias, self._format(name))

    def experts(
        self,
        name: str,
        count: int,
        in_features: int,
        parts: dict[str, int],
        bias: bool,
        num_unnamed: int = 0,
    ) -> ExpertLinear:
        return ExpertLinear(count, in_features, parts, bias, self._format(name), num_unnamed)

    def are_alike(self, name: str, other: str) -> bool:
        """Whether two matrices have the same format."""
        formats = dict(self.formats)
        return formats.get(self.prefix + name) == formats.get(self.prefix + other)

    def head(
        self, in_features: int, vocab_size: int, bias: bool, embedding: nn.Parameter | None
    ) -> Head:
        """The output head. embedding: the matrix of a tied head; None: the head has its own."""
        format = Plain(self.products.linear) if embedding is not None else self._format("lm_head")
        return Head(in_features, vocab_size, bias, format, embedding)

    def norm(self, spec: NormSpec, *shape: int) -> nn.Module:
        """The module of a NormSpec. shape: the shape of its weight."""
        return make_norm(spec, shape, self.products.rms_norm)

    def _format(self, name: str) -> WeightFormat:
        spec = dict(self.formats).get(self.prefix + name)
        if isinstance(spec, MixedSpec):
            return mixed(spec, self.products.linear)
        return Plain(self.products.linear) if spec is None else Quantized(spec)
