"""The roofline of a step: the bytes and FLOPs it needs at least, and the seconds they take.

The counts follow from a ModelSpec alone. A step reads all weights once (the output head once, tied
or not; embedding rows are not counted) and the KV of every context once, as far back as a layer
sees. Each parameter costs two FLOPs per token. A measured time below the floor means that the
measurement is broken. The module knows specs and ceilings, no engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

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

    def at_least(self, other: Ceilings) -> Ceilings:
        """The higher of two measurements of each ceiling: a rate reached once can be reached."""
        return Ceilings(*map(max, astuple(self), astuple(other)))


@dataclass(frozen=True, slots=True)
class StepCost:
    """The minimum work of a step, in bytes and FLOPs."""

    weight_bytes: int
    kv_bytes: int
    flops: int

    @property
    def num_bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes

    def seconds(self, ceilings: Ceilings) -> float:
        """The floor: the longer of memory time and compute time, which may overlap."""
        moving = self.num_bytes / ceilings.bytes_per_s
        return max(moving, self.flops / ceilings.flops_per_s)


def weights_read(spec: ModelSpec) -> int:
    """The fewest parameters a step reads: all blocks, the final norm and the output head.

    Of a mixture of experts only the experts of one token count, as all tokens may share them.
    """
    body = sum(layer.num_parameters_used for layer in spec.layers)
    return body + spec.hidden_size + spec.vocab_size * spec.embedding_width


def decode_cost(spec: ModelSpec, batch: int, context: int, itemsize: int) -> StepCost:
    """One new token for each of `batch` requests whose context, this token included, is `context`.

    itemsize: bytes of a weight and of a KV element.
    """
    parameters = weights_read(spec)
    attention = sum(4 * layer.attn.num_seen(context) * layer.attn.q_size for layer in spec.layers)
    return StepCost(
        weight_bytes=parameters * itemsize,
        kv_bytes=batch * spec.kv_bytes_seen(context, itemsize),
        flops=batch * (2 * parameters + attention),
    )


def prefill_cost(spec: ModelSpec, batch: int, length: int, itemsize: int) -> StepCost:
    """`batch` prompts of `length` tokens from nothing to their first token (causal attention)."""
    head = spec.vocab_size * spec.embedding_width
    body = weights_read(spec) - head
    attention = 0
    for layer in spec.layers:
        # The last token sees `seen` positions, and each token before it one fewer.
        seen = layer.attn.num_seen(length)
        attention += (4 * seen * length - 2 * seen * seen) * layer.attn.q_size
    return StepCost(
        weight_bytes=(body + head) * itemsize,
        kv_bytes=batch * length * spec.kv_bytes_per_token(itemsize),
        flops=batch * (2 * body * length + attention + 2 * head),
    )


def time_to_first_token_floor(
    spec: ModelSpec, ceilings: Ceilings, batch: int, input_len: int, itemsize: int
) -> float:
    """Floor of TTFT in seconds: from `batch` prompts to the first token of each."""
    return prefill_cost(spec, batch, input_len, itemsize).seconds(ceilings)


def time_per_output_token_floor(
    spec: ModelSpec,
    ceilings: Ceilings,
    batch: int,
    input_len: int,
    output_len: int,
    itemsize: int,
) -> float:
    """Floor of TPOT in seconds, averaged over the tokens after the first, as contexts grow."""
    contexts = range(input_len + 1, input_len + output_len)
    steps = (decode_cost(spec, batch, context, itemsize) for context in contexts)
    return sum(step.seconds(ceilings) for step in steps) / len(contexts)


def offline_floor(
    spec: ModelSpec, ceilings: Ceilings, lengths: Sequence[tuple[int, int]], itemsize: int
) -> float:
    """Floor in seconds for a set of requests that start together.

    lengths: (input, output) tokens of each request. Whatever the batching, every token of the
    longest output reads the weights once, and every output token after the first reads the KV of
    its context. Memory time and compute time may overlap entirely. All requests are assumed to fit
    into memory at once.
    """
    longest = max(output for _, output in lengths)
    num_bytes = longest * weights_read(spec) * itemsize
    flops = 0
    for input_len, output_len in lengths:
        flops += prefill_cost(spec, 1, input_len, itemsize).flops
        flops += decode_cost(spec, output_len - 1, 0, itemsize).flops
        for layer, count in spec.distinct_layers.items():
            contexts = range(input_len + 1, input_len + output_len)
            seen = count * sum(map(layer.attn.num_seen, contexts))
            num_bytes += seen * 2 * layer.attn.kv_size * itemsize
            flops += seen * 4 * layer.attn.q_size
    return max(num_bytes / ceilings.bytes_per_s, flops / ceilings.flops_per_s)
