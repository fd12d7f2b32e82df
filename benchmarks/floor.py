"""The roofline of a step: the bytes and FLOPs it needs at least, and the seconds they take.

The counts follow from a ModelSpec alone. A step reads all weights once (the output head once, tied
or not; embedding rows are not counted) and the KV of every context once, as far back as a layer
sees. Each parameter costs two FLOPs per token, or one if it is kept in 8 bits, which tensor cores
multiply at twice the rate of 16 bits. A measured time below the floor means that the measurement is
broken. The module depends on specs and ceilings, but on no engine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from compiledllm.models.matrices import Weights
from compiledllm.models.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Measured limits of the hardware, in bytes/s and FLOP/s.

    A copy counts its reads and its writes.
    """

    read_bytes_per_s: float
    copy_bytes_per_s: float
    flops_per_s: float

    @property
    def bytes_per_s(self) -> float:
        return max(self.read_bytes_per_s, self.copy_bytes_per_s)

    def share_of_copy_rate(self, num_bytes: int, seconds: float) -> float:
        """The rate at which bytes were moved, as a share of a copy's, to three digits."""
        return float(f"{num_bytes / seconds / self.copy_bytes_per_s:.3g}")

    def at_least(self, other: Ceilings) -> Ceilings:
        """The higher of two measurements of each ceiling: a rate reached once can be reached."""
        return Ceilings(*map(max, astuple(self), astuple(other)))


@dataclass(frozen=True, slots=True)
class StepCost:
    """The minimum work of a step, in bytes and FLOPs. kv_bytes: of the KV cache and of states."""

    weight_bytes: int
    kv_bytes: int
    flops: int

    @property
    def num_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes

    def floor_s(self, ceilings: Ceilings) -> float:
        """The floor: the longer of memory time and compute time, which may overlap."""
        memory_s = self.num_bytes / ceilings.bytes_per_s
        return max(memory_s, self.flops / ceilings.flops_per_s)


def product_flops(weights: Weights) -> int:
    """FLOPs of a token's products with these weights, in products of 16 bits that take as long."""
    in_8_bits = sum(matrix.num_in_8_bits for matrix in weights.matrices)
    return 2 * weights.num_parameters - in_8_bits


def decode_cost(spec: ModelSpec, batch: int, context: int) -> StepCost:
    """One new token for each of `batch` requests whose context, this token included, is `context`.

    The spec's dtypes are the engine's (`ModelSpec.with_dtypes`).
    """
    weights = spec.weights_read
    kv_bytes = attention = 0
    for attn in spec.attentions:
        seen = attn.num_seen(context)
        kv_bytes += seen * spec.kv_of(attn).bytes_per_token
        attention += 4 * seen * attn.q_size
    return StepCost(
        weight_bytes=spec.num_bytes(weights),
        kv_bytes=batch * (kv_bytes + _moved_state_bytes(spec)),
        flops=batch * (product_flops(weights) + attention + spec.flops_of_states),
    )


def _moved_state_bytes(spec: ModelSpec) -> int:
    """Bytes that a decode step moves for a request's states: it reads and writes each once."""
    return 2 * spec.bytes_per_request


def prefill_cost(spec: ModelSpec, batch: int, length: int) -> StepCost:
    """`batch` prompts of `length` tokens from nothing to their first token (causal attention)."""
    weights = spec.weights_read
    head = product_flops(Weights(weights.matrices[:1]))
    body = product_flops(weights) - head
    mixing = length * spec.flops_of_states
    for attn in spec.attentions:
        # The last token sees `seen` positions, and each token before it one fewer.
        seen = attn.num_seen(length)
        mixing += (4 * seen * length - 2 * seen * seen) * attn.q_size
    kv_bytes = length * sum(spec.kv_of(attn).bytes_per_token for attn in spec.attentions)
    return StepCost(
        weight_bytes=spec.num_bytes(weights),
        kv_bytes=batch * (kv_bytes + spec.bytes_per_request),
        flops=batch * (body * length + mixing + head),
    )


def time_to_first_token_floor(
    spec: ModelSpec, ceilings: Ceilings, batch: int, input_len: int
) -> float:
    """Floor of TTFT in seconds: from `batch` prompts to the first token of each."""
    return prefill_cost(spec, batch, input_len).floor_s(ceilings)


def time_per_output_token_floor(
    spec: ModelSpec,
    ceilings: Ceilings,
    batch: int,
    input_len: int,
    output_len: int,
) -> float:
    """Floor of TPOT in seconds, averaged over the tokens after the first, as contexts grow."""
    contexts = range(input_len + 1, input_len + output_len)
    steps = (decode_cost(spec, batch, context) for context in contexts)
    return sum(step.floor_s(ceilings) for step in steps) / len(contexts)


def offline_floor(spec: ModelSpec, ceilings: Ceilings, lengths: Sequence[tuple[int, int]]) -> float:
    """Floor in seconds for a set of requests that start together.

    lengths: (input, output) tokens of each request. Whatever the batching, every token of the
    longest output reads the weights once, and every output token after the first reads the KV of
    its context. Memory time and compute time may overlap entirely. All requests are assumed to fit
    into memory at once.
    """
    max_output_len = max(output for _, output in lengths)
    num_bytes = max_output_len * spec.num_bytes(spec.weights_read)
    flops = 0
    for input_len, output_len in lengths:
        flops += prefill_cost(spec, 1, input_len).flops
        flops += decode_cost(spec, output_len - 1, 0).flops
        num_bytes += (output_len - 1) * _moved_state_bytes(spec)
        for attn, count in Counter(spec.attentions).items():
            contexts = range(input_len + 1, input_len + output_len)
            seen = count * sum(map(attn.num_seen, contexts))
            num_bytes += seen * spec.kv_of(attn).bytes_per_token
            flops += seen * 4 * attn.q_size
    return max(num_bytes / ceilings.bytes_per_s, flops / ceilings.flops_per_s)
