"""The engines that can be measured, behind one interface: prompts in, a fixed number of tokens out.

Every engine ignores the end of sequence and has no detokenization, and no prefix cache unless the
options ask for one. All engines load the same checkpoint (or random weights of its shapes) in the
same dtype, and sample greedily, unless `CompiledLLM.sampling_as` says otherwise.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from compiledllm import SamplingParams
from compiledllm.benchmarks.model import Model
from compiledllm.benchmarks.other_environment import OtherEnvironment
from compiledllm.benchmarks.profile import StepProfile, StepTimes
from compiledllm.benchmarks.transformers_peer import Transformers
from compiledllm.benchmarks.workload import Generated, SampleRequest, check_lengths, ids_of
from compiledllm.config import ConfigError
from compiledllm.engine_options import ONLINE

T = TypeVar("T")
# Engine options that vLLM shares under the same name and meaning.
_VLLM_OPTIONS = (
    "max_model_len",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "max_num_seqs",
    "max_num_batched_tokens",
    "tensor_parallel_size",
    "kv_cache_dtype",
    "enable_prefix_caching",
    "enforce_eager",
    "seed",
)
# vLLM's names of the methods that quantise while loading.
_VLLM_ONLINE = {
    "fp8": "fp8_per_channel",
    "fp8_block": "fp8_per_block",
    "int8": "int8_per_channel_weight_only",
}
# Sampling parameters by the names that `bench latency --sampling` takes.
SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "temperature": {"temperature": 0.8},
    "filtered": {"temperature": 0.8, "top_k": 50, "top_p": 0.95},
    "one-penalised": {"temperature": 0, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
    "logprobs": {"temperature": 0, "logprobs": 5},
}
_SHARED_MEMORY = 0.94  # fraction of the GPU's memory for all engines of a run together
# vLLM refuses to start if less than `gpu_memory_utilization` of the GPU's memory is free, even if
# `kv_cache_memory_bytes` sets the size of its cache, which then does not depend on the fraction.
_UNUSED_UTILIZATION = 0.05


class Peer(Protocol):
    """An engine under measurement."""

    name: str
    startup_s: dict[str, float]  # phase -> seconds, for engines that report phases

    def generate(self, requests: Sequence[SampleRequest]) -> Generated:
        """Run all requests to their last token."""

    def inter_token_times(self, requests: Sequence[SampleRequest]) -> list[float] | None:
        """Seconds between consecutive tokens; None if the engine returns whole outputs only."""

    def step_times(self, requests: Sequence[SampleRequest]) -> StepTimes | None:
        """Host and device seconds of a decode step; None if the engine cannot be profiled."""


def make_peer(name: str, model: Model, shared_by: int = 1, hf_max_batch_size: int = 16) -> Peer:
    """Load the engine `name`. shared_by: the number of engines that share the GPU's memory."""
    model = _sharing(model, shared_by)
    if name == "vllm":
        return VLLM(model)
    return Transformers(model, hf_max_batch_size) if name == "transformers" else CompiledLLM(model)


def make_other_peer(label: str, python: str, model: Model, shared_by: int) -> OtherEnvironment:
    """Start the engine of another environment: vLLM if the label says so, or else compiledllm.

    An engine that measures the GPU's memory is ready when the function returns, as no other engine
    may start meanwhile. With `kv_cache_memory_bytes`, engines start at the same time.
    """
    model = _sharing(model, shared_by)
    kind = "vllm" if label.startswith("vllm") else "compiledllm"
    options = _vllm_options(model) if kind == "vllm" else _own_options(model)
    peer = OtherEnvironment(label, kind, python, options)
    if "kv_cache_memory_bytes" not in model.options:
        peer.wait_until_ready()
    return peer


def _sharing(model: Model, shared_by: int) -> Model:
    """The model with its share of the memory, unless `kv_cache_memory_bytes` sizes its cache."""
    is_sized = "kv_cache_memory_bytes" in model.options
    if shared_by == 1 or is_sized or not model.platform.is_cuda:
        return model
    share = {"gpu_memory_utilization": round(_SHARED_MEMORY / shared_by, 3)}
    return replace(model, options=share | dict(model.options))


def _own_options(model: Model) -> dict[str, Any]:
    return {
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        **model.options,
        "model": str(model.path.resolve()),
        "device": str(model.platform.device),
        "dtype": model.dtype,
    }


def _vllm_options(model: Model) -> dict[str, Any]:
    shared = {name: model.options[name] for name in _VLLM_OPTIONS if name in model.options}
    shared.setdefault("enable_prefix_caching", False)
    if "kv_cache_memory_bytes" in shared:
        shared.setdefault("gpu_memory_utilization", _UNUSED_UTILIZATION)
    if model.has_random_weights:
        shared["load_format"] = "dummy"
    raw_config = model.raw_config
    if method := model.options.get("quantization"):
        shared |= _vllm_quantization(method, raw_config)
    if "text_config" in raw_config:
        shared["language_model_only"] = True  # as here: a wrapper's towers are not loaded
    return shared | {
        "model": str(model.path.resolve()),
        "dtype": model.dtype,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
    }


def _vllm_quantization(method: str, raw_config: Mapping[str, Any]) -> dict[str, str]:
    """vLLM's option for a method, which it reads from the config of a quantised checkpoint."""
    if method not in ONLINE or "quantization_config" in raw_config:
        return {}
    if method not in _VLLM_ONLINE:
        raise ConfigError(
            f"vLLM has no quantization='{method}' of 16-bit checkpoints; measure a checkpoint that "
            "is quantised already"
        )
    return {"quantization": _VLLM_ONLINE[method]}


class CompiledLLM:
    """compiledllm itself."""

    name = "compiledllm"
    sampling = "greedy"

    def __init__(self, model: Model) -> None:
        started = time.perf_counter()
        from compiledllm import Engine  # here, as runs of other engines do not need it

        imported = time.perf_counter() - started
        self.engine = Engine(**_own_options(model))
        seconds = self.engine.core.ledger.close()
        seconds["import"] += imported
        self.startup_s = seconds
        self._device = model.platform.device

    def sampling_as(self, sampling: str) -> CompiledLLM:
        """The same engine with other sampling parameters, as a peer of its own."""
        other = copy.copy(self)
        other.sampling, other.name = sampling, f"{self.name}, {sampling}"
        return other

    def _params(self, output_lens: Iterable[int]) -> list[SamplingParams]:
        """Sampling parameters of each request. "one-penalised" penalises the first request only."""
        plain = [_greedy(length) for length in output_lens]
        sampled = [replace(params, **SAMPLING[self.sampling]) for params in plain]
        return sampled[:1] + plain[1:] if self.sampling == "one-penalised" else sampled

    def generate(self, requests: Sequence[SampleRequest]) -> Generated:
        params = self._params(request.output_len for request in requests)
        prompts = [ids_of(r) for r in requests]
        start = time.perf_counter()
        outputs = self.engine.generate(prompts, params, use_tqdm=False)
        return _generated(requests, time.perf_counter() - start, outputs)

    def inter_token_times(self, requests: Sequence[SampleRequest]) -> list[float] | None:
        params = self._params(request.output_len for request in requests)
        last: dict[str, float] = {}
        gaps = []
        for output in self.engine.stream([ids_of(r) for r in requests], params):
            now = time.perf_counter()
            if output.request_id in last:
                gaps.append(now - last[output.request_id])
            last[output.request_id] = now
        return gaps

    def step_times(self, requests: Sequence[SampleRequest]) -> StepTimes:
        """Host and device seconds of a decode step in which every request takes part."""
        return self.while_decoding(
            requests, lambda step: StepProfile.of(step, self._device).times()
        )

    def while_decoding(
        self, requests: Sequence[SampleRequest], measure: Callable[[Callable[[], object]], T]
    ) -> T:
        """Call `measure` with a function that runs one decode step of all requests.

        Returns the result of `measure`. As in `generate`, steps make no outputs before requests
        finish.
        """
        engine, limit = self.engine, self.engine.config.limits.max_model_len
        assert limit is not None
        params = self._params(max(limit - len(ids_of(r)), 1) for r in requests)
        params = [replace(p, stream_interval=limit) for p in params]
        ids = [engine.add_request(ids_of(r), p) for r, p in zip(requests, params, strict=True)]
        try:
            prompts_left = set(ids)
            while prompts_left:
                prompts_left -= {output.request_id for output in engine.step()}
            return measure(engine.step)
        finally:
            for request_id in ids:
                engine.abort_request(request_id)


class VLLM:
    """vLLM's offline `LLM`, at its defaults."""

    name = "vllm"

    def __init__(self, model: Model) -> None:
        started = time.perf_counter()
        try:
            import vllm
        except ImportError as error:
            raise ConfigError(
                f"engine 'vllm' cannot be imported ({error}); install it: pip install vllm"
            ) from None
        self.startup_s = {"import": time.perf_counter() - started}
        self._vllm = vllm
        self._llm = vllm.LLM(**_vllm_options(model))

    def generate(self, requests: Sequence[SampleRequest]) -> Generated:
        params = [
            self._vllm.SamplingParams(
                temperature=0.0, max_tokens=r.output_len, ignore_eos=True, detokenize=False
            )
            for r in requests
        ]
        prompts = [{"prompt_token_ids": ids_of(r)} for r in requests]
        start = time.perf_counter()
        outputs = self._llm.generate(prompts, params, use_tqdm=False)
        return _generated(requests, time.perf_counter() - start, outputs)

    def inter_token_times(self, requests: Sequence[SampleRequest]) -> list[float] | None:
        return None  # the offline API returns finished answers only

    def step_times(self, requests: Sequence[SampleRequest]) -> StepTimes | None:
        return None  # vLLM's steps run in another process


def _generated(requests: Sequence[SampleRequest], seconds: float, outputs: Any) -> Generated:
    """outputs: the engine's `RequestOutput` of each request."""
    token_ids = [list(output.outputs[0].token_ids) for output in outputs]
    check_lengths(requests, token_ids)
    return Generated(seconds, token_ids)


def _greedy(output_len: int) -> SamplingParams:
    return SamplingParams(
        temperature=0, max_tokens=output_len, ignore_eos=True, detokenize=False, seed=0
    )
