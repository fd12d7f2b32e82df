"""Makes the request factory and the vocabulary from an engine's `Ready` message."""

from __future__ import annotations

from pathlib import Path

from compiledllm.config import EngineConfig
from compiledllm.engine.requests import RequestFactory
from compiledllm.engine.served_model import ServedModel
from compiledllm.engine.tokenizer import Tokenizer
from compiledllm.grammars.library import Vocabulary
from compiledllm.log import log
from compiledllm.models.source import resolve_checkpoint
from compiledllm.remote.wire import Ready


def make_request_factory(message: Ready) -> RequestFactory:
    return RequestFactory(make_served_model(message), load_tokenizer(message))


def make_served_model(message: Ready) -> ServedModel:
    # The name of the backend in use need not be one that can be asked for.
    options = message.options | {"attention_backend": "auto"}
    return ServedModel(
        config=EngineConfig.from_options(**options),
        max_model_len=options["max_model_len"],
        model_path=Path(message.model_path),
        vocab_size=message.vocab_size,
        eos_token_ids=tuple(message.eos_token_ids),
        num_slots=message.num_slots,
        max_position=message.max_position,
    )


def load_tokenizer(message: Ready) -> Tokenizer | None:
    if message.options["skip_tokenizer_init"]:
        return None
    other = message.options["tokenizer"]
    return Tokenizer(
        resolve_checkpoint(other, weights=False) if other else Path(message.model_path)
    )


def load_vocabulary(requests: RequestFactory) -> Vocabulary | None:
    """The vocabulary for structured outputs; if there is none, log why and return None."""
    try:
        requests.grammars().compiler.start()
        return requests.grammars().vocabulary
    except ValueError as error:
        log.info("%-10s none (%s)", "grammars", error)
        return None
