"""Specs of the part of a decoder block after the mixer: an MLP, or a mixture of experts.

Each spec says which weights the layer takes, and which of these weights one token uses.
"""

from __future__ import annotations

from dataclasses import dataclass

from compiledllm.models.matrices import MatrixSpec, Weights


@dataclass(frozen=True, slots=True)
class MlpSpec:
    """down(act(gate(x)) * up(x)), or ungated down(act(up(x))).

    activation: a key of `layers.mlp.ACTIVATIONS`, or "xielu", which has parameters. sparsity: about
    this share of a token's gates becomes zero before the activation (`layers.mlp.SparseGates`);
    only for gated MLPs; 0: none.
    """

    intermediate_size: int
    bias: bool = False
    activation: str = "silu"
    gated: bool = True
    sparsity: float = 0.0

    def weights(self, hidden_size: int, path: str = "mlp") -> Weights:
        parts = (self.intermediate_size,) * (1 + self.gated)
        num_up, name = sum(parts), f"{path}.gate_up" if self.gated else f"{path}.up"
        up = MatrixSpec(name, num_up, hidden_size, parts=parts)
        down = MatrixSpec(f"{path}.down", hidden_size, self.intermediate_size)
        num_of_activation = 4 * (self.activation == "xielu")
        return Weights((up, down), self.bias * (num_up + hidden_size) + num_of_activation)

    weights_used = weights


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """How the logits of a router become a token's experts and their weights.

    scores: "softmax" or "sigmoid" of the logits; the weights are the scores of the chosen experts.
    has_bias: a learned bias is added to the scores for the choice, but not for the weights.
    num_groups, top_groups: neighbouring experts form `num_groups` groups of equal size, and experts
    are chosen only from the `top_groups` groups whose two best experts have the largest sums.
    renormalize: the weights are divided by their sum plus `eps`. scale: multiplies the weights
    after that. has_expert_scales: a learned number for each expert multiplies the weights, too.
    in_float32: the router's matrix is kept in float32 and the logits are computed in float32,
    whatever the model's dtype.
    """

    scores: str = "softmax"
    renormalize: bool = True
    has_bias: bool = False
    num_groups: int = 1
    top_groups: int = 1
    eps: float = 0.0
    scale: float = 1.0
    has_expert_scales: bool = False
    in_float32: bool = False


@dataclass(frozen=True, slots=True)
class MoeSpec:
    """Mixture of experts: each token goes through `top_k` gated MLPs, weighted by a router.

    intermediate_size: of one expert. shared_size: intermediate size of a shared expert that every
    token uses; 0: none. has_shared_gate: a sigmoid gate weights the shared expert. bias: experts
    and router have biases. activation: "silu" or "gelu_tanh". alpha, limit: parameters of clamped
    experts, see `kernels.moe.moe_experts`. scales_inputs: the router's weights multiply the inputs
    of the experts instead of their outputs.
    """

    intermediate_size: int
    num_experts: int
    top_k: int
    router: RouterSpec = RouterSpec()
    shared_size: int = 0
    has_shared_gate: bool = True
    bias: bool = False
    activation: str = "silu"
    alpha: float = 1.0
    limit: float = 0.0
    scales_inputs: bool = False

    def weights(self, hidden_size: int, path: str = "mlp") -> Weights:
        """All weights of the layer. path: the layer's path within its block."""
        return self._weights(hidden_size, self.num_experts, path)

    def weights_used(self, hidden_size: int, path: str = "mlp") -> Weights:
        """The weights that one token uses."""
        return self._weights(hidden_size, self.top_k, path)

    def _weights(self, hidden_size: int, num_experts: int, path: str) -> Weights:
        size, router = self.intermediate_size, self.router
        matrices = (
            MatrixSpec(
                f"{path}.router", self.num_experts, hidden_size, is_float32=router.in_float32
            ),
            MatrixSpec(f"{path}.gate_up", 2 * size, hidden_size, num_experts, parts=(size, size)),
            MatrixSpec(f"{path}.down", hidden_size, size, num_experts),
        )
        biases = self.num_experts + num_experts * (2 * size + hidden_size)
        num_router_others = self.num_experts * (router.has_bias + router.has_expert_scales)
        experts = Weights(matrices, self.bias * biases + num_router_others)
        if not self.shared_size:
            return experts
        gate = (MatrixSpec(f"{path}.shared_gate", 1, hidden_size),) * self.has_shared_gate
        shared = MlpSpec(self.shared_size).weights(hidden_size, f"{path}.shared")
        return experts.plus(shared, Weights(gate))


@dataclass(frozen=True, slots=True)
class OpaqueSpec:
    """All of a block but its attention, in a model that transformers runs: only parameter counts.

    total, used: number of all parameters, and of the parameters that one token uses.
    intermediate_size: 0 if unknown.
    """

    total: int
    used: int
    intermediate_size: int = 0

    def weights(self, _hidden_size: int) -> Weights:
        return Weights(num_others=self.total)

    def weights_used(self, _hidden_size: int) -> Weights:
        return Weights(num_others=self.used)
