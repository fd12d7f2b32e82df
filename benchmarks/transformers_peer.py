"""transformers' `generate` as a peer."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from compiledllm.benchmarks.model import Model
from compiledllm.benchmarks.profile import StepTimes
from compiledllm.benchmarks.workload import Generated, SampleRequest, ids_of


class Transformers:
    """transformers' `generate`, static cache, in batches padded on the left."""

    name = "transformers"

    def __init__(self, model: Model, max_batch_size: int) -> None:
        self._max_batch_size = max_batch_size
        started = time.perf_counter()
        import transformers

        self._transformers = transformers
        self.startup_s = {"import": time.perf_counter() - started}
        self._device = model.platform.device
        auto = transformers.AutoModelForCausalLM
        arguments = {"dtype": model.torch_dtype, "attn_implementation": "sdpa"}
        with self._device:
            if model.has_random_weights:
                config = transformers.AutoConfig.from_pretrained(model.path)
                self._model = auto.from_config(config, **arguments)
            else:
                self._model = auto.from_pretrained(model.path, **arguments)
        self._model.to(self._device).eval()

    def generate(self, requests: Sequence[SampleRequest]) -> Generated:
        start = time.perf_counter()
        outputs = list(map(self._generate_batch, self._batches(requests)))
        seconds = time.perf_counter() - start
        token_ids = [row for output in outputs for row in output.tolist()]
        pairs = zip(requests, token_ids, strict=True)
        return Generated(seconds, [row[: request.output_len] for request, row in pairs])

    def inter_token_times(self, requests: Sequence[SampleRequest]) -> list[float] | None:
        gaps = []
        for batch in self._batches(requests):
            stamps: list[float] = []
            self._generate_batch(batch, stamps)
            for before, after in zip(stamps, stamps[1:], strict=False):
                gaps += [after - before] * len(batch)
        return gaps

    def step_times(self, requests: Sequence[SampleRequest]) -> StepTimes | None:
        return None  # `generate` cannot be stopped between two steps

    def _batches(self, requests: Sequence[SampleRequest]) -> list[Sequence[SampleRequest]]:
        size = self._max_batch_size
        return [requests[start : start + size] for start in range(0, len(requests), size)]

    @torch.inference_mode()
    def _generate_batch(
        self, batch: Sequence[SampleRequest], stamps: list[float] | None = None
    ) -> torch.Tensor:
        """Generate the longest output for all requests; append each step's end to `stamps`.

        Returns token ids [requests, longest output].
        """
        prompts, count = [ids_of(r) for r in batch], max(r.output_len for r in batch)
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=self._device)
        lengths = torch.tensor([[len(p)] for p in prompts], device=self._device)
        mask = torch.arange(width, device=self._device) >= width - lengths
        config = self._transformers.GenerationConfig(
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            cache_implementation="static",
            eos_token_id=None,
            pad_token_id=0,
        )
        watch = None if stamps is None else [self._stamper(stamps)]
        output = self._model.generate(
            ids, attention_mask=mask.long(), generation_config=config, stopping_criteria=watch
        )
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        generated: torch.Tensor = output[:, width:]
        if generated.shape[1] != count:
            raise RuntimeError(f"transformers generated {generated.shape[1]} tokens, not {count}")
        return generated

    def _stamper(self, stamps: list[float]) -> Callable[..., torch.Tensor]:
        def stamp(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            if input_ids.is_cuda:
                torch.cuda.synchronize(input_ids.device)
            stamps.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        return stamp
