"""Decides whether one kernel computes all layers of a decode step of few rows."""

from __future__ import annotations

from compiledllm.choices import Choice
from compiledllm.kernels import decode_step_cuda
from compiledllm.kernels.decode_step import DecodeStep
from compiledllm.kernels.machine_code import CudaError
from compiledllm.log import log
from compiledllm.models import decode_blocks
from compiledllm.models.decoder import Decoder
from compiledllm.runner.model_runner import ModelRunner
from compiledllm.runner.plan import Plan

_SINGLE = "layer by layer"


def decode_step_for(plan: Plan, model: Decoder) -> DecodeStep | str:
    """A model's decode step, still to be bound to the KV cache; or why its layers run one by one.

    Allocates the kernel's workspace, and begins to compile the kernel.
    """
    if reason := why_not(plan):
        return reason
    found = decode_blocks.describe(model, plan.config.limits.block_size)
    if isinstance(found, str):
        return found
    shape, layers = found
    if reason := decode_step_cuda.why_not(shape, plan.platform.device):
        return reason
    faster = decode_step_cuda.faster_rows(shape)
    rows = range(faster.start, min(faster.stop, plan.config.limits.max_num_seqs + 1))
    if not rows:
        return "separate kernels are faster for layers and batches of this size"
    return DecodeStep(shape, layers, decode_step_cuda, rows)


def use_decode_step(runner: ModelRunner, found: DecodeStep | str) -> Choice:
    """From now on, run small decode steps by their kernel, if there is one and it compiles.

    found: from `decode_step_for`. Call this after a step has compiled the kernels of single layers,
    which small steps with prompts run.
    """
    if isinstance(found, DecodeStep):
        try:
            runner.use_decode_step(found)
        except CudaError as error:
            log.warning("the layers of small decode steps run one by one: %s", error)
            return Choice(_SINGLE, str(error))
        weights = f"{found.shape.num_weights / 1e6:.1f} M weights a layer"
        return Choice(f"all layers in one kernel at {_in_words(found.rows)}", weights)
    return Choice(_SINGLE, found)


def _in_words(rows: range) -> str:
    least, most = rows[0], rows[-1]
    if least == most:
        return f"{most} row{'s' * (most > 1)}"
    return f"up to {most} rows" if least == 1 else f"{least} to {most} rows"


def why_not(plan: Plan) -> str | None:
    """Why the plan's layers run one by one, as far as this is known before the weights."""
    options = plan.config.requested.compile
    if not options.persistent_decode:
        return "persistent_decode=False"
    if options.deterministic:
        return "deterministic"
    if not plan.backend.runs_ahead:
        return f"attention_backend='{plan.backend.name}' plans step by step"
    if len(plan.kv_layout.windows) > 1:
        return "its layers have several block tables"
    return plan.why_not_capture() or decode_blocks.why_not(plan.spec)
