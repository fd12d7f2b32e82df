"""Makes the request factory and the grammars' vocabulary from an engine's `Ready` message."""

from __future__ import annotations

from pathlib import Path

from compiledllm.config import EngineConfig
from compiledllm.engine.requests import RequestFactory
from compiledllm.engine.served_model import ServedModel
from compiledllm.engine.tokenizer import load
from compiledllm.grammars.library import Vocabulary
from compiledllm.log import log
from compiledllm.remote.wire import Ready


def make_request_factory(message: Ready) -> RequestFactory:
    model = make_served_model(message)
    return RequestFactory(model, load(model.config, model.model_path))


def make_served_model(message: Ready) -> ServedModel:
    # The resolved backend may be "fixed_order", which is not a value of the option.
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


def load_vocabulary(requests: RequestFactory) -> Vocabulary | None:
    """The vocabulary for structured outputs; if there is none, log why and return None."""
    try:
        requests.grammars().compiler.start()
        return requests.grammars().vocabulary
    except ValueError as error:
        log.info("%-10s none (%s)", "grammars", error)
        return None
