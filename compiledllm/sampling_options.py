"""The sampling options of `compiledllm generate` and `compiledllm chat`, as SamplingParams."""

from __future__ import annotations

import argparse
import secrets

from compiledllm.arguments import count
from compiledllm.config import ConfigError
from compiledllm.sampling_params import SamplingParams
from compiledllm.structured_outputs import StructuredOutputsParams


def add_sampling_options(group: argparse._ArgumentGroup) -> None:
    """Add the options of a request to `generate` or `chat`."""
    group.add_argument("--temperature", type=float, default=0.7, help="0 is greedy (default 0.7)")
    group.add_argument("--top-p", type=float, default=1.0, help="nucleus sampling, (0, 1]")
    group.add_argument("--top-k", type=int, default=0, help="0: all tokens")
    min_p = "least probability, relative to the likeliest token"
    group.add_argument("--min-p", type=float, default=0.0, help=min_p)
    penalty = "[-2, 2]; for tokens that the answer has"
    group.add_argument("--presence-penalty", type=float, default=0.0, metavar="X", help=penalty)
    penalty = "[-2, 2]; per occurrence of a token in the answer"
    group.add_argument("--frequency-penalty", type=float, default=0.0, metavar="X", help=penalty)
    penalty = "for tokens of prompt and answer, if above 1 (1)"
    group.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help=penalty)
    group.add_argument("--max-tokens", type=count, default=None, help="most tokens to generate")
    group.add_argument("--min-tokens", type=count, default=0, help="fewest tokens to generate")
    group.add_argument("--stop", action="append", help="stop at this text (repeatable)")
    stop_ids = "stop at these tokens"
    group.add_argument("--stop-token-ids", type=int, nargs="+", metavar="ID", help=stop_ids)
    group.add_argument("--bad-words", nargs="+", metavar="WORD", help="texts not to generate")
    group.add_argument("--ignore-eos", action="store_true", help="do not stop at end of sequence")
    forms = group.add_mutually_exclusive_group()
    forms.add_argument("--json-schema", metavar="FILE", help="answer in JSON of this schema")
    forms.add_argument("--regex", metavar="PATTERN", help="answer with a text that matches this")
    forms.add_argument("--choice", nargs="+", metavar="TEXT", help="answer with one of these texts")


def sampling_params_of(arguments: argparse.Namespace, max_tokens: int | None) -> SamplingParams:
    """The parameters that the options ask for. max_tokens: the default of --max-tokens.

    Raises ValueError for a bad value, and ConfigError for a schema that cannot be read.
    """
    same = [
        *("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty"),
        *("repetition_penalty", "min_tokens", "stop", "stop_token_ids", "bad_words", "ignore_eos"),
    ]
    return SamplingParams(
        seed=arguments.seed if "seed" in arguments else secrets.randbits(62),
        max_tokens=max_tokens if arguments.max_tokens is None else arguments.max_tokens,
        structured_outputs=_form(arguments),
        **{name: getattr(arguments, name) for name in same},
    )


def _form(arguments: argparse.Namespace) -> StructuredOutputsParams | None:
    """The form that the answer must have. Raises ConfigError for a schema that cannot be read."""
    schema = arguments.json_schema
    if schema is not None:
        try:
            with open(schema, encoding="utf-8") as file:
                schema = file.read()
        except OSError as error:
            raise ConfigError(f"--json-schema {schema} cannot be read: {error}") from None
    forms = {"json": schema, "regex": arguments.regex, "choice": arguments.choice}
    given = {name: form for name, form in forms.items() if form is not None}
    return StructuredOutputsParams(**given) if given else None
