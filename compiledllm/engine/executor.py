"""Makes the worker that carries out a plan: a single worker, or the first of several ranks.

One scheduler decides for all ranks. Each rank holds its part of the weights and of every KV block,
runs the same steps and draws the same tokens.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch

from compiledllm.choices import Choice
from compiledllm.config import ConfigError
from compiledllm.ledger import Ledger
from compiledllm.runner.pending import PendingOutput
from compiledllm.runner.plan import Plan
from compiledllm.runner.worker import Worker
from compiledllm.types import SchedulerOutput, StepOutput

if TYPE_CHECKING:
    from compiledllm.engine.rank_processes import RankGroup


def make_executor(plan: Plan, ledger: Ledger) -> Worker:
    """Load the model of a plan, in as many processes as it has ranks. Raises ConfigError."""
    if plan.ranks.are_many:
        with ledger.phase("ranks"):
            group = start_ranks(plan)
        return FirstRank(plan, group, ledger)
    return Worker(plan, ledger)


def start_ranks(plan: Plan) -> RankGroup:
    """Start the processes of all ranks but the first. Raises ConfigError for too few GPUs."""
    from compiledllm.engine.rank_processes import RankGroup

    num_ranks, is_cuda = plan.ranks.count, plan.platform.is_cuda
    if plan.config.requested.model.distributed_executor_backend == "ray":
        return _start_in_ray(num_ranks, is_cuda)
    num_gpus = torch.cuda.device_count() if is_cuda else 0
    if is_cuda and num_ranks > num_gpus:
        raise ConfigError(
            f"tensor_parallel_size={num_ranks} needs as many GPUs, and there are {num_gpus}; use "
            f"at most {num_gpus}"
        )
    return RankGroup(num_ranks, lambda rank: f"cuda:{rank}" if is_cuda else "cpu")


def _start_in_ray(num_ranks: int, is_cuda: bool) -> RankGroup:
    from compiledllm.engine.rank_processes import RankGroup
    from compiledllm.engine.ray_ranks import RayPlaces

    places = RayPlaces(num_ranks, is_cuda)
    try:
        if places.gpu not in ("", "0"):
            raise ConfigError(
                f"Ray has GPU {places.gpu} left on this machine, and the engine's process takes "
                f"the first that it sees; set CUDA_VISIBLE_DEVICES={places.gpu}"
            )
        # A worker of Ray's sees its own GPU only, as the first.
        device = "cuda:0" if is_cuda else "cpu"
        return RankGroup(num_ranks, lambda _: device, places.start_rank, places.host)
    except BaseException:
        places.give_back()
        raise


class FirstRank(Worker):
    """The worker of rank 0, which sends every call to the other ranks as well.

    is_broken: a step has failed in some process, so the ranks may have computed different steps and
    the engine must be started again.
    """

    def __init__(self, plan: Plan, group: RankGroup, ledger: Ledger) -> None:
        from compiledllm.engine.rank_frames import Build

        self.is_broken = False
        self._group = group
        self._num_in_flight = 0
        self._end = weakref.finalize(self, group.end)
        try:
            # Each rank's plan enlarges the requested block size by itself, if necessary.
            asked: dict[str, Any] = {"block_size": plan.config.requested.cache.block_size}
            asked["device"] = plan.platform.device.type
            group.send(Build(plan.config.options() | asked))
            super().__init__(plan, ledger)
            with ledger.phase("ranks"):
                self._check_agreement()
        except BaseException:
            self._end()
            raise
        divided = f"among {plan.ranks.count} processes"
        self.report.note("all_reduce", Choice(divided, f"{group.sums_by} adds up their parts"))

    def count_kv_blocks(self) -> int:
        """The number of blocks for which every rank has room."""
        from compiledllm.engine.rank_frames import CountBlocks

        self._group.send(CountBlocks())
        own = super().count_kv_blocks()
        with self.ledger.phase("ranks"):
            least = min(answer.num_kv_blocks for answer in self._group.answers())
        if least < own:
            self.report.note("num_kv_blocks", Choice(least, "what the fullest GPU has room for"))
        return min(own, least)

    def start(self, num_kv_blocks: int, max_blocks: int) -> None:
        from compiledllm.engine.rank_frames import Run

        self._group.send(Run(num_kv_blocks, max_blocks))
        super().start(num_kv_blocks, max_blocks)
        self._group.graphs = self.runner.graphs
        with self.ledger.phase("ranks"):
            self._group.answers()

    def launch(self, step: SchedulerOutput) -> PendingOutput:
        """Launch one step on all ranks. Raises RankError if one has ended."""
        from compiledllm.engine.rank_frames import Step

        # The ranks may differ until rank 0 has launched the step, too.
        was_broken, self.is_broken = self.is_broken, True
        self._group.send(Step.of(step, self._num_in_flight))
        try:
            pending = super().launch(step)
        except RuntimeError:
            self._group.wait_for_failure()  # raises if the cause is another rank's failure
            raise
        self._num_in_flight += 1
        self.is_broken = was_broken
        return pending

    def collect(self, pending: PendingOutput) -> StepOutput:
        """Wait for the results of a launched step. Raises RankError if a rank has ended."""
        self.is_broken = True
        while not pending.has_arrived:
            self._group.check()
        output = super().collect(pending)
        self._num_in_flight -= 1
        self.is_broken = False
        return output

    def reset(self) -> None:
        """Forget all requests after a failed step; if `is_broken`, end all other ranks."""
        from compiledllm.engine.rank_frames import Reset

        if self.is_broken:
            self._end()
            return
        self._num_in_flight = 0
        self._group.send(Reset())
        super().reset()
        self._group.answers()

    def _check_agreement(self) -> None:
        own = self.plan.agreement
        for answer in self._group.answers():
            if answer.agreement != own:
                raise ConfigError(
                    f"the GPUs of a model must be alike: one rank planned {answer.agreement}, the "
                    f"first {own}; choose equal GPUs, such as with CUDA_VISIBLE_DEVICES"
                )
