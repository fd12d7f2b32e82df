"""What a step must move and compute at least, from a ModelSpec alone, and how long that takes.

Weights are read once (the output head once, tied or not; embedding rows are not counted), the KV of
every context once, and each parameter costs two operations a token. A time below the floor means
the measurement is broken. Knows specs and ceilings, no engine.
"""

from __future__ import annotations

from dataclasses import dataclass

from compiledllm.models.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the hardware gives, measured: bytes per second read, operations per second."""

    read_bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True, slots=True)
class StepCost:
    """The least a step can do."""

    weight_bytes: int
    kv_bytes: int
    flops: int

    @property
    def num_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes

    def seconds(self, ceilings: Ceilings) -> float:
        """The floor: the longer of moving the bytes and doing the operations."""
        moving = self.num_bytes / ceilings.read_bytes_per_s
        return max(moving, self.flops / ceilings.flops_per_s)


def weights_read(spec: ModelSpec) -> int:
    """Parameters a step reads: all blocks, the final norm and the output head."""
    body = sum(layer.num_parameters for layer in spec.layers)
    return body + spec.hidden_size + spec.vocab_size * spec.hidden_size


def decode_cost(spec: ModelSpec, batch: int, context: int, itemsize: int) -> StepCost:
    """One new token for each of `batch` requests whose context, this token included, is `context`.

    itemsize: bytes of a weight and of a KV element.
    """
    parameters = weights_read(spec)
    attention = sum(4 * context * layer.attn.q_size for layer in spec.layers)
    return StepCost(
        weight_bytes=parameters * itemsize,
        kv_bytes=batch * context * spec.kv_bytes_per_token(itemsize),
        flops=batch * (2 * parameters + attention),
    )


def prefill_cost(spec: ModelSpec, batch: int, length: int, itemsize: int) -> StepCost:
    """`batch` prompts of `length` tokens from nothing to their first token (causal attention)."""
    head = spec.vocab_size * spec.hidden_size
    body = weights_read(spec) - head
    attention = sum(2 * length * length * layer.attn.q_size for layer in spec.layers)
    return StepCost(
        weight_bytes=(body + head) * itemsize,
        kv_bytes=batch * length * spec.kv_bytes_per_token(itemsize),
        flops=batch * (2 * body * length + attention + 2 * head),
    )
