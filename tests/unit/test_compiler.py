"""The helper process: what kills it is a ValueError, others are served meanwhile, and it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compiledllm.grammars import compiler as compiler_module
from compiledllm.grammars.compiler import Compiler, CompilersBusy
from compiledllm.grammars.grammar import Grammars
from compiledllm.grammars.matcher import initial_matcher
from compiledllm.grammars.stack import TRIAL_BYTES, TRUSTED_BYTES, call_with_stack
from compiledllm.structured_outputs import StructuredOutputsParams
from tests.support.grammars import make_vocabulary, references, rules

VOCABULARY = make_vocabulary()


@pytest.fixture(scope="module")
def compiler() -> Iterator[Compiler]:
    made = Compiler(VOCABULARY)
    yield made
    made.close()


def form(**fields: Any) -> StructuredOutputsParams:
    return StructuredOutputsParams(**fields)


SLOW = {"oneOf": [{"pattern": f"a{i}"} for i in range(400)]}  # each without all the others


def helper_of(compiler: Compiler) -> int:
    compiler.start()
    assert compiler._helper is not None
    return compiler._helper.process.pid


def workers_of(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until_ended(pids: list[int]) -> None:
    deadline = time.monotonic() + 30
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, pids
        time.sleep(0.02)


@pytest.mark.parametrize("deep", [{"grammar": rules(6000)}, {"json": references(1800)}])
def test_a_stack_that_overflows_is_a_refusal(deep: dict[str, Any], compiler: Compiler) -> None:
    helper = helper_of(compiler)
    with pytest.raises(ValueError, match="cannot be compiled: it is nested too deep; make it"):
        compiler.text_of(form(**deep))
    assert compiler.text_of(form(regex="a")) and helper_of(compiler) == helper


@pytest.mark.parametrize("deep", [{"grammar": rules(1500)}, {"json": references(400)}])
def test_what_the_helper_takes_can_be_followed_with_little_stack(
    deep: dict[str, Any], compiler: Compiler
) -> None:
    """Compiled again with 16 times the stack, and walked with a fraction of any thread's."""
    assert TRUSTED_BYTES >= 16 * TRIAL_BYTES
    grammar = Grammars(VOCABULARY)
    start = call_with_stack(
        TRUSTED_BYTES, initial_matcher, compiler.text_of(form(**deep)), grammar.tokenizer
    )

    def walk() -> int:
        matcher, count = start.deep_copy(), 0
        while not matcher.is_stopped() and count < 2000:
            mask = int.from_bytes(matcher.compute_bitmask(), "little")
            token_id = mask.bit_length() - 1
            assert token_id >= 0 and not matcher.is_error()
            matcher.consume_token(token_id)
            count += 1
        return count

    assert call_with_stack(2**18, walk) > 1


def test_time_is_limited_and_others_are_served_meanwhile(compiler: Compiler) -> None:
    compiler.start()
    slow: list[BaseException] = []

    def attack() -> None:
        try:
            compiler.text_of(form(json=SLOW))
        except Exception as error:
            slow.append(error)

    attacks = [threading.Thread(target=attack) for _ in range(2)]
    for thread in attacks:
        thread.start()
    served = 0
    while any(thread.is_alive() for thread in attacks):
        assert compiler.text_of(form(regex=f"a{served}"))
        served += 1
    assert served > 3
    assert any("did not compile within 2 s; make it simpler" in str(error) for error in slow)


def test_memory_is_limited(compiler: Compiler) -> None:
    """A worker has a limit, at which it is aborted."""
    workers = workers_of(helper_of(compiler))
    limits = Path(f"/proc/{workers[0]}/limits").read_text()
    (line,) = [line for line in limits.splitlines() if line.startswith("Max address space")]
    assert "unlimited" not in line
    found: list[BaseException] = []

    def attack() -> None:
        try:
            compiler.text_of(form(json=SLOW | {"title": "memory"}))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=attack)
    thread.start()
    time.sleep(0.1)
    for pid in workers:
        os.kill(pid, signal.SIGABRT)
    thread.join()
    assert "it takes too much memory; make it simpler" in str(found[0])


def test_crowds_are_told_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Compiler(VOCABULARY)
    monkeypatch.setattr(compiler_module, "COMPILE_LIMIT_S", 0.05)
    for lock in compiler._workers:
        lock.acquire()
    with pytest.raises(CompilersBusy, match="try again"):
        compiler.text_of(form(regex="a"))
    while compiler._slots.acquire(blocking=False):
        pass
    with pytest.raises(CompilersBusy, match="many requests"):
        compiler.text_of(form(regex="a"))


@pytest.mark.parametrize("whom", ["workers", "helper", "all"])
def test_what_was_killed_is_started_again(whom: str, compiler: Compiler) -> None:
    helper = helper_of(compiler)
    victims = workers_of(helper) if whom != "helper" else []
    for pid in [*victims, *([helper] if whom != "workers" else [])]:
        os.kill(pid, signal.SIGKILL)
    wait_until_ended([*victims, *([helper] if whom != "workers" else [])])
    texts = []
    for i in range(9):
        try:
            texts.append(compiler.text_of(form(regex=f"b{i}")))
        except ValueError:  # the one that the death may have been noted for
            assert not texts
    assert len(texts) >= 8
    assert (helper_of(compiler) == helper) == (whom == "workers")


PROGRAM = """
import os, sys
from compiledllm.grammars.grammar import Grammars
from compiledllm.grammars.library import Vocabulary
from compiledllm.structured_outputs import StructuredOutputsParams
grammars = Grammars(Vocabulary(sys.stdin.read(), {size}, (0,)))
grammars.compile(StructuredOutputsParams(regex="a"))
pid = grammars.compiler._helper.process.pid
children = open(f"/proc/{{pid}}/task/{{pid}}/children").read()
print(pid, children, "torch" in sys.modules, flush=True)
{end}
"""


@pytest.mark.parametrize("end", ["", "os.kill(os.getpid(), 9)", "os._exit(0)"])
def test_it_ends_with_a_program_without_a_guard(end: str) -> None:
    program = PROGRAM.format(size=VOCABULARY.size, end=end)
    done = subprocess.run(
        [sys.executable, "-c", program],
        input=VOCABULARY.tokenizer_json,
        capture_output=True,
        text=True,
        timeout=120,
    )
    *pids, has_torch = done.stdout.split()
    assert len(pids) == 3 and has_torch == "False", done.stderr
    wait_until_ended(list(map(int, pids)))


def test_closing_leaves_no_process() -> None:
    compiler = Compiler(VOCABULARY)
    helper = helper_of(compiler)
    pids = [helper, *workers_of(helper)]
    compiler.close()
    assert not Path(f"/proc/{helper}").exists()  # not even as a zombie
    wait_until_ended(pids)


def test_dead_ends_of_a_grammar_are_found_when_it_is_made(compiler: Compiler) -> None:
    dead = 'start: "a" x | "b"\nx: "c" Y\nY: /d/ & /e/'
    with pytest.raises(ValueError, match="leads to a dead end: nothing may follow"):
        compiler.text_of(form(grammar=dead))


def test_what_schemas_have_for_nothing_is_logged_once(
    compiler: Compiler, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compiledllm.log.log.propagate", True)
    with caplog.at_level("INFO", logger="compiledllm"):
        for title in "ab":
            schema = {"type": "string", "format": "colour", "title": title}
            compiler.text_of(form(json=schema))
    assert caplog.text.count("format 'colour'") == 1


def test_schemas_inside_of_grammars_are_rewritten_too(compiler: Compiler) -> None:
    schema = '{"type": "string", "format": "colour", "$comment": "}"}'
    tag = {
        "structures": [{"begin": "<f>", "schema": {"format": "x"}, "end": ""}],
        "triggers": ["<f"],
    }
    for fields in ({"grammar": f'start: "a" j\nj: %json {schema}'}, {"structural_tag": tag}):
        assert "format" not in compiler.text_of(form(**fields))


def test_half_a_character_is_refused(compiler: Compiler) -> None:
    for fields in ({"regex": "\ud800"}, {"json": {"const": "\ud800"}}, {"choice": ["\ud800"]}):
        with pytest.raises(ValueError, match="half a surrogate pair"):
            compiler.text_of(form(**fields))
