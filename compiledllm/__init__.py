"""compiledllm: a compiler-driven LLM inference and serving engine.

The public names load on first use, so that `import compiledllm` and `compiledllm --help` stay fast.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING

from compiledllm.version import __version__

if TYPE_CHECKING:
    from compiledllm.arguments import FlexibleArgumentParser
    from compiledllm.beam_search_params import BeamSearchParams
    from compiledllm.config import ConfigError, EngineConfig
    from compiledllm.engine.engine import LLM, Engine
    from compiledllm.engine.llm_engine import LLMEngine
    from compiledllm.engine.prompts import TextPrompt, TokensPrompt
    from compiledllm.engine_args import AsyncEngineArgs, EngineArgs
    from compiledllm.outputs import (
        BeamSearchOutput,
        BeamSearchSequence,
        CompletionOutput,
        EmbeddingOutput,
        EmbeddingRequestOutput,
        Logprob,
        RequestOutput,
        ScoringOutput,
        ScoringRequestOutput,
    )
    from compiledllm.pooling_params import PoolingParams
    from compiledllm.remote.async_engine import AsyncEngine, AsyncLLM, AsyncLLMEngine
    from compiledllm.remote.errors import EngineDeadError, EngineError
    from compiledllm.sampling_params import (
        RepetitionDetectionParams,
        RequestOutputKind,
        SamplingParams,
    )
    from compiledllm.structured_outputs import ReasoningTokens, StructuredOutputsParams

# OpenMP's threads wait for each other hundreds of times per step. By default they spin so long that
# one other busy process makes a step take seconds (2 cores, one of them busy: 1.6 tokens/s, with a
# short spin 12 tokens/s). The variable has an effect only if torch is not loaded yet.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

_HOMES = {
    "Engine": "compiledllm.engine.engine",
    "LLM": "compiledllm.engine.engine",
    "AsyncEngine": "compiledllm.remote.async_engine",
    "AsyncLLM": "compiledllm.remote.async_engine",
    "AsyncLLMEngine": "compiledllm.remote.async_engine",
    "LLMEngine": "compiledllm.engine.llm_engine",
    "EngineArgs": "compiledllm.engine_args",
    "AsyncEngineArgs": "compiledllm.engine_args",
    "FlexibleArgumentParser": "compiledllm.arguments",
    "TextPrompt": "compiledllm.engine.prompts",
    "TokensPrompt": "compiledllm.engine.prompts",
    "EngineError": "compiledllm.remote.errors",
    "EngineDeadError": "compiledllm.remote.errors",
    "EngineConfig": "compiledllm.config",
    "ConfigError": "compiledllm.config",
    "SamplingParams": "compiledllm.sampling_params",
    "RequestOutputKind": "compiledllm.sampling_params",
    "RepetitionDetectionParams": "compiledllm.sampling_params",
    "BeamSearchParams": "compiledllm.beam_search_params",
    "ReasoningTokens": "compiledllm.structured_outputs",
    "StructuredOutputsParams": "compiledllm.structured_outputs",
    "PoolingParams": "compiledllm.pooling_params",
    "RequestOutput": "compiledllm.outputs",
    "CompletionOutput": "compiledllm.outputs",
    "EmbeddingOutput": "compiledllm.outputs",
    "EmbeddingRequestOutput": "compiledllm.outputs",
    "ScoringOutput": "compiledllm.outputs",
    "ScoringRequestOutput": "compiledllm.outputs",
    "Logprob": "compiledllm.outputs",
    "BeamSearchOutput": "compiledllm.outputs",
    "BeamSearchSequence": "compiledllm.outputs",
}

__all__ = [
    "LLM",
    "AsyncEngine",
    "AsyncEngineArgs",
    "AsyncLLM",
    "AsyncLLMEngine",
    "BeamSearchOutput",
    "BeamSearchParams",
    "BeamSearchSequence",
    "CompletionOutput",
    "ConfigError",
    "EmbeddingOutput",
    "EmbeddingRequestOutput",
    "Engine",
    "EngineArgs",
    "EngineConfig",
    "EngineDeadError",
    "EngineError",
    "FlexibleArgumentParser",
    "LLMEngine",
    "Logprob",
    "PoolingParams",
    "ReasoningTokens",
    "RepetitionDetectionParams",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "ScoringOutput",
    "ScoringRequestOutput",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
    "__version__",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'compiledllm' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
