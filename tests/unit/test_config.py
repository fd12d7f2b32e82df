"""Engine options: flat in, grouped and checked once, resolved with a reason for each value."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from compiledllm.arguments import add_option
from compiledllm.choices import Choice
from compiledllm.config import (
    ConfigError,
    EngineConfig,
    all_options,
    check_types_and_choices,
    option_groups,
)
from compiledllm.engine_options import CacheConfig, ModelConfig, SchedulerConfig, option
from compiledllm.resolved_config import StepLimits, resolve

OPTIONS = [f for _, f in all_options()]
CHOSEN_FROM = {f.name: f.metadata["choices"] for f in OPTIONS if f.metadata["choices"]}
COUNTS = (
    "max_model_len",
    "kv_cache_memory_bytes",
    "num_kv_blocks",
    "max_num_seqs",
    "max_num_batched_tokens",
)
SWITCHES = (
    "skip_tokenizer_init",
    "enable_prefix_caching",
    "enforce_eager",
)


def refusal(**options: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        EngineConfig.from_options(**options)
    return str(refused.value)


# -- wrong values ---------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [0, 8, 24, -16])
def test_block_size_that_is_no_multiple_of_16_is_refused(block_size: int) -> None:
    assert refusal(block_size=block_size) == (
        f"block_size must be a multiple of 16, got {block_size}; try 16 or 32"
    )


@pytest.mark.parametrize("share", [0, -0.5, 1.01, math.nan, math.inf])
def test_memory_share_out_of_range_is_refused(share: float) -> None:
    assert refusal(gpu_memory_utilization=share) == (
        f"gpu_memory_utilization must be in (0, 1], got {share}"
    )


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [0, -2])
def test_count_below_one_is_refused(name: str, value: int) -> None:
    or_auto = " or 'auto'" * (name == "max_model_len")
    assert refusal(**{name: value}) == f"{name} must be an integer >= 1{or_auto}, got {value}"


@pytest.mark.parametrize("name", [*COUNTS, "seed", "block_size", "max_logprobs"])
def test_integer_that_no_message_can_carry_is_refused(name: str) -> None:
    for value in (2**63, 10**30):
        assert refusal(**{name: value}) == f"{name} must be a 64-bit integer, got {value}"


@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in CHOSEN_FROM for value in ("bogus", 1)],
)
def test_value_outside_the_choices_is_refused_with_the_choices(name: str, value: Any) -> None:
    choices = ", ".join(CHOSEN_FROM[name])
    assert refusal(**{name: value}) == f"{name} must be one of {choices}, got {value!r}"


@pytest.mark.parametrize(
    ("names", "values"),
    [
        (COUNTS, [16.0, "16", True]),
        (("block_size",), [16.0, "16", True]),
        (("gpu_memory_utilization",), ["0.9", True]),
        (("seed",), ["7", 1.5, True]),
        (SWITCHES, ["yes", 1, [True]]),
        (("model", "tokenizer", "revision", "device"), [1, True, b"name"]),
        (tuple(f.name for f in OPTIONS if f.metadata["kind"] != "dict"), [[3.5], {"a": 1}]),
    ],
    ids=lambda case: case[0] if isinstance(case, tuple) else "",
)
def test_value_of_another_type_is_refused(names: tuple[str, ...], values: list[Any]) -> None:
    for name in names:
        for value in values:
            message = refusal(**{name: value})
            assert message.startswith(f"{name} must be ")
            assert f"got {value!r}" in message


def test_kind_of_an_option_is_its_annotation() -> None:
    for f in OPTIONS:
        annotations = {"path": "str", "length": "int | str", "dict": "dict[str, Any]"}
        annotation = annotations.get(f.metadata["kind"], f.metadata["kind"])
        assert str(f.type) == annotation + " | None" * (f.default is None), f.name


@dataclasses.dataclass(frozen=True)
class Future:
    """Options of kinds that no option has yet."""

    lora_modules: Any = option(None, "a list", kind="list")
    hf_overrides: Any = option(None, "a dictionary", kind="dict")


@pytest.mark.parametrize(
    ("name", "value", "other", "words"),
    [
        ("lora_modules", ["a", "b"], {"a": 1}, "a list"),
        ("hf_overrides", {"a": {"b": 1}}, ["a"], "a dictionary"),
    ],
)
def test_lists_and_dictionaries_are_possible(
    name: str, value: Any, other: Any, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    check_types_and_choices(Future(**{name: value}))
    with pytest.raises(ConfigError, match=f"{name} must be {words} or None, got"):
        check_types_and_choices(Future(**{name: other}))
    parser = argparse.ArgumentParser()
    for f in dataclasses.fields(Future):
        add_option(parser.add_argument_group("engine"), f)
    flag = "--" + name.replace("_", "-")
    assert vars(parser.parse_args([flag, json.dumps(value)])) == {name: value}
    for wrong in (json.dumps(other), "{"):
        with pytest.raises(SystemExit):
            parser.parse_args([flag, wrong])
        assert f"must be {words} as JSON" in capsys.readouterr().err


# -- unknown names --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        ("blok_size", "block_size"),
        ("max_seqs", "max_num_seqs"),
        ("enable_prefix_cache", "enable_prefix_caching"),
        ("kv_blocks", "num_kv_blocks"),
    ],
)
def test_unknown_option_is_refused_with_the_nearest_name(wrong: str, nearest: str) -> None:
    message = refusal(**{wrong: 1})
    assert f"unknown engine option '{wrong}'; did you mean '{nearest}'?" in message


def test_option_like_no_other_is_refused_with_the_known_names() -> None:
    message = refusal(zzz=1)
    assert "did you mean" not in message
    for f in OPTIONS:
        assert f.name in message


def test_group_name_is_no_option() -> None:
    assert "unknown engine option 'scheduler'" in refusal(scheduler=SchedulerConfig())


# -- from options ---------------------------------------------------------------------------------


def test_no_options_is_the_default_config() -> None:
    assert EngineConfig.from_options() == EngineConfig()


def test_flat_options_land_in_their_groups() -> None:
    config = EngineConfig.from_options(model="m", block_size=32, max_num_seqs=3, enforce_eager=True)
    assert config.model == ModelConfig(model="m")
    assert config.cache == CacheConfig(block_size=32)
    assert config.scheduler == SchedulerConfig(max_num_seqs=3)
    assert config.compile.enforce_eager


def test_paths_become_strings() -> None:
    config = EngineConfig.from_options(model=Path("a/b"), tokenizer=Path("c"))
    assert (config.model.model, config.model.tokenizer) == ("a/b", "c")
    assert "revision must be a string or None" in refusal(revision=Path("main"))


def test_option_names_are_unique_over_all_groups() -> None:
    names = [f.name for f in OPTIONS]
    assert len(set(names)) == len(names)


def test_every_option_has_a_help_text_and_a_default_that_passes() -> None:
    for f in OPTIONS:
        assert f.metadata["help"]
        EngineConfig.from_options(**{f.name: f.default})


def test_every_choice_passes() -> None:
    for name, choices in CHOSEN_FROM.items():
        for value in choices:
            EngineConfig.from_options(**{name: value})


def test_a_group_is_made_of_the_options_that_it_holds() -> None:
    for group, kind in option_groups().items():
        assert dataclasses.is_dataclass(kind) and getattr(EngineConfig(), group) == kind()


def test_config_cannot_be_changed() -> None:
    config = EngineConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.cache.block_size = 32  # type: ignore[misc]


# -- replace --------------------------------------------------------------------------------------


def test_replace_changes_what_is_named_and_keeps_the_rest() -> None:
    config = EngineConfig.from_options(model="m", block_size=32, seed=7)
    changed = config.replace(block_size=48, max_num_seqs=2)
    assert changed == EngineConfig.from_options(model="m", block_size=48, seed=7, max_num_seqs=2)
    assert config.cache.block_size == 32


def test_replace_checks_again() -> None:
    with pytest.raises(ConfigError, match="block_size must be a multiple of 16, got 17"):
        EngineConfig().replace(block_size=17)
    with pytest.raises(ConfigError, match="unknown engine option 'blocksize'"):
        EngineConfig().replace(blocksize=16)


# -- resolve --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("on_gpu", "memory", "seqs", "batched", "when"),
    [
        (False, 500 * 2**30, 64, 512, "busy"),
        (True, 24 * 2**30, 256, 8192, "start"),
        (True, 79 * 2**30, 1024, 16384, "start"),
    ],
)
def test_open_values_are_filled_in_for_the_machine(
    on_gpu: bool, memory: int, seqs: int, batched: int, when: str
) -> None:
    config, reasons = resolve(EngineConfig(), on_gpu, 2048, memory)
    assert config.limits == StepLimits(16, seqs, batched, 2048)
    assert config.compile_when == when
    assert config.async_scheduling is on_gpu
    assert reasons["max_model_len"] == Choice(2048, "the model's context")
    where = "the default on a GPU" if on_gpu else "the default on a CPU"
    assert reasons["max_num_seqs"] == Choice(seqs, where)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_model_len", 100),
        ("max_num_seqs", 3),
        ("max_num_batched_tokens", 33),
        ("compile_when", "background"),
    ],
)
def test_given_values_are_kept_as_asked(name: str, value: Any) -> None:
    requested = EngineConfig.from_options(**{name: value})
    config, reasons = resolve(requested, on_gpu=False, max_position=2048)
    assert reasons[name] == Choice(value, "as asked")
    assert config.options()[name] == value


def test_resolved_config_leaves_nothing_open_but_what_the_memory_decides() -> None:
    config, reasons = resolve(EngineConfig(), on_gpu=False, max_position=2048)
    for name in reasons.lines():
        assert reasons[name].value not in (None, "auto")
        assert config.options()[name] == reasons[name].value
    again = EngineConfig.from_options(**config.options())
    resolved, reasons = resolve(again, on_gpu=True, max_position=2048)
    assert resolved.options() == config.options()
    assert {choice.partition(" (")[2] for choice in reasons.lines().values()} == {"as asked)"}


def test_resolving_keeps_the_other_options() -> None:
    requested = EngineConfig.from_options(model="m", block_size=32, seed=5, dtype="float32")
    config, _ = resolve(requested, on_gpu=False, max_position=64)
    assert config.requested == requested and config.limits.block_size == 32
    assert {"model": "m", "block_size": 32, "seed": 5}.items() <= config.options().items()
    assert config.options()["dtype"] == "float32"


def test_context_beyond_the_models_positions_is_refused_with_both_numbers() -> None:
    requested = EngineConfig.from_options(max_model_len=4096)
    with pytest.raises(ConfigError, match="max_model_len=4096 is more than the 2048 positions"):
        resolve(requested, on_gpu=False, max_position=2048)
    config, _ = resolve(requested, on_gpu=False, max_position=4096)
    assert config.limits.max_model_len == 4096


def test_choice_prints_its_value_and_reason() -> None:
    assert str(Choice(64, "the default on a CPU")) == "64 (the default on a CPU)"


def test_no_larger_batch_is_captured_than_can_run() -> None:
    requested = EngineConfig.from_options(max_num_seqs=8, max_cudagraph_capture_size=4)
    assert resolve(requested, True, 64)[0].max_cudagraph_capture_size == 4
    config, reasons = resolve(EngineConfig.from_options(max_num_seqs=8), True, 64)
    assert config.max_cudagraph_capture_size == 8
    assert str(reasons["max_cudagraph_capture_size"]) == "8 (max_num_seqs, at most 512)"
    for too_much in (
        EngineConfig.from_options(max_num_seqs=8, max_cudagraph_capture_size=9),
        EngineConfig.from_options(max_cudagraph_capture_size=257),
    ):
        with pytest.raises(ConfigError, match=r"max_cudagraph_capture_size=\d+ .* max_num_seqs="):
            resolve(too_much, True, 64)
