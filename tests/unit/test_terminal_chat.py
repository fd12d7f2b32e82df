"""The terminal's chat: what is a turn, what is a command, and what a terminal sees of it."""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from compiledllm.sampling_params import SamplingParams
from compiledllm.terminal_chat import Chat, turns, typed_turns

ENTER, ALT_ENTER, UP, CTRL_C, CTRL_D = "\r", "\x1b\r", "\x1b[A", "\x03", "\x04"


def pasted(text: str) -> str:
    """As a terminal sends it; line ends of a paste are carriage returns."""
    return "\x1b[200~" + text.replace("\n", "\r") + "\x1b[201~"


def typed(keys: str, history: Path, count: int | None = None) -> list[str]:
    """The turns of these keys; so many at most, as the rest would be waited for."""
    with create_pipe_input() as pipe:
        pipe.send_text(keys)
        with create_app_session(input=pipe, output=DummyOutput()):
            return list(islice(typed_turns(history), count))


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("hello" + ENTER, "hello"),
        ("helo\x1b[Dl" + ENTER, "hello"),  # to the left, an l
        (pasted("one\ntwo\n\nthree") + ENTER, "one\ntwo\n\nthree"),
        ("see: " + pasted("a\nb") + " ok?" + ENTER, "see: a\nb ok?"),
        ('"""' + ENTER + "one" + ENTER + "  two" + ENTER + '"""' + ENTER, "one\n  two"),
        ('"""one' + ENTER + 'two"""' + ENTER, "one\ntwo"),
        ('"""one"""' + ENTER, "one"),
        ("one" + ALT_ENTER + "two" + ENTER, "one\ntwo"),
        ("never mind" + CTRL_C + "hello" + ENTER, "hello"),
        (pasted('"""\nx\n"""') + ENTER, "x"),
    ],
)
def test_keys_make_one_turn(keys: str, expected: str, tmp_path: Path) -> None:
    assert typed(keys + CTRL_D, tmp_path / "history") == [expected]


def test_what_was_typed_is_found_again_by_the_next_session_of_the_same_user(
    tmp_path: Path,
) -> None:
    history = tmp_path / "state" / "history"
    typed("first" + ENTER + pasted("a\nb") + ENTER, history, 2)
    assert stat.S_IMODE(history.stat().st_mode) == 0o600
    assert stat.S_IMODE(history.parent.stat().st_mode) == 0o700
    history.chmod(0o644)  # as an older program may have left it
    assert typed(UP + ENTER, history, 1) == ["a\nb"]
    assert typed(UP + UP + UP + ENTER, history, 1) == ["first"]  # the second goes up a line
    assert stat.S_IMODE(history.stat().st_mode) == 0o600


def test_a_history_that_cannot_be_kept_is_no_obstacle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert typed("hello" + ENTER, tmp_path / "file" / "history", 1) == ["hello"]
    assert "no history of what you type is kept" in capsys.readouterr().err


def test_pipes_give_a_turn_for_each_line_or_quoted_block(monkeypatch: pytest.MonkeyPatch) -> None:
    text = 'hello\n\n"""\none\n  two\n"""\n"""x"""\n/help\n"""no end\n'
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert list(turns()) == ["hello", "", "one\n  two", "x", "/help"]


# -- the conversation ------------------------------------------------------------------------------


class FakeEngine:
    """Answers with the number of messages it was given; notes them."""

    def __init__(self, fails_at: str = "", stops_at: str = "") -> None:
        self.seen: list[list[tuple[str, str]]] = []
        self._fails_at, self._stops_at = fails_at, stops_at
        self.num_closed = 0

    def stream_chat(self, messages: list[dict[str, str]], params: SamplingParams) -> Iterator[Any]:
        self.seen.append([(message["role"], message["content"]) for message in messages])
        metrics = SimpleNamespace(arrival_time=0.0, first_token_time=1.0, last_token_time=2.0)
        try:
            for text in ("n", f"n{len(messages)}"):
                completion = SimpleNamespace(text=text, token_ids=[1], finish_reason="stop")
                yield SimpleNamespace(outputs=[completion], metrics=metrics, prompt_token_ids=[1])
                if messages[-1]["content"] == self._fails_at:
                    raise ValueError("too long")
                if messages[-1]["content"] == self._stops_at:
                    raise KeyboardInterrupt
        finally:
            self.num_closed += 1


def talk(engine: FakeEngine, *texts: str) -> list[bool]:
    chat = Chat(engine, SamplingParams())  # type: ignore[arg-type]
    return [chat.take(text) for text in texts]


def test_a_conversation_keeps_what_was_said_and_commands_are_not_said() -> None:
    engine = FakeEngine()
    goes_on = talk(engine, "/system be kind", "one", "/help", "/nonsense", "", "two", "/exit")
    assert goes_on == [True] * 6 + [False]
    system = ("system", "be kind")
    assert engine.seen == [
        [system, ("user", "one")],
        [system, ("user", "one"), ("assistant", "n2"), ("user", "two")],
    ]


def test_a_quiet_chat_prints_answers_alone_and_has_its_system_prompt(
    capsys: pytest.CaptureFixture[str],
) -> None:
    engine = FakeEngine()
    chat = Chat(engine, SamplingParams(), "be kind", shows_speed=False)  # type: ignore[arg-type]
    for text in ("one", "/clear", "two"):
        chat.take(text)
    assert [seen[0] for seen in engine.seen] == [("system", "be kind")] * 2
    shown = capsys.readouterr()
    assert shown.err == "" and shown.out.startswith("n2\n")


@pytest.mark.parametrize("command", ["/clear", "/new"])
def test_a_new_conversation_forgets(command: str) -> None:
    engine = FakeEngine()
    talk(engine, "/system be kind", "one", command, "two", "/system", "three")
    assert engine.seen[1] == [("system", "be kind"), ("user", "two")]
    assert engine.seen[2][0] == ("user", "two")


@pytest.mark.parametrize("command", ["/exit", "/quit", "/bye"])
def test_commands_that_leave(command: str) -> None:
    assert talk(FakeEngine(), command) == [False]


@pytest.mark.parametrize("text", ["/etc/hosts is what?", "/exit\nis a command", "a /exit"])
def test_text_that_looks_like_a_command_is_said(text: str) -> None:
    engine = FakeEngine()
    assert talk(engine, text) == [True]
    assert engine.seen == [[("user", text)]]


def test_an_error_takes_the_question_back_and_an_interrupt_keeps_what_came(
    capsys: pytest.CaptureFixture[str],
) -> None:
    engine = FakeEngine(fails_at="fail", stops_at="stop")
    talk(engine, "fail", "stop", "go on")
    assert engine.seen[1] == [("user", "stop")]
    assert engine.seen[2] == [("user", "stop"), ("assistant", "n"), ("user", "go on")]
    assert engine.num_closed == 3
    shown = capsys.readouterr()
    assert "error: too long; /clear starts" in shown.err and "(stopped)" in shown.out


# -- a terminal ------------------------------------------------------------------------------------

PROGRAM = """
import fcntl, itertools, signal, termios, time
from types import SimpleNamespace
from compiledllm.terminal_chat import Chat

fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C comes from this terminal

class Engine:
    def stream_chat(self, messages, params):
        said = messages[-1]["content"]
        print("HEARD", repr(said), len(messages))
        for i in itertools.count() if said == "count" else range(2):
            completion = SimpleNamespace(text=" ".join(map(str, range(i + 1))), token_ids=[1],
                                         finish_reason="stop")
            times = SimpleNamespace(arrival_time=0, first_token_time=0, last_token_time=0)
            yield SimpleNamespace(outputs=[completion], metrics=times, prompt_token_ids=[1])
            time.sleep(0.02)

# A shell starts its background jobs with the signal ignored, and so the tests that run in one.
signal.signal(signal.SIGINT, signal.default_int_handler)
Chat(Engine(), None).run()
print("LEFT")
"""


READY = r"\?2004h.*>"  # the terminal is told to mark pastes, and shown the prompt


class Terminal:
    """The program in a pseudo-terminal: its keyboard is `press`, its screen is `shown`."""

    def __init__(self, home: Path) -> None:
        self._keyboard, inner = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            stdin=inner,
            stdout=inner,
            stderr=inner,
            start_new_session=True,
            env={
                **os.environ,
                "XDG_STATE_HOME": str(home),
                "TERM": "xterm",
                "PROMPT_TOOLKIT_NO_CPR": "1",
            },
        )
        os.close(inner)
        self.shown = ""

    def press(self, keys: str) -> None:
        os.write(self._keyboard, keys.encode())

    def wait_for(self, pattern: str) -> None:
        """Forgets what was shown up to there."""
        deadline = time.monotonic() + 60
        while not (found := re.search(pattern, self.shown, re.DOTALL)):
            assert time.monotonic() < deadline, self.shown
            if select.select([self._keyboard], [], [], 0.1)[0]:
                try:
                    self.shown += os.read(self._keyboard, 65536).decode(errors="replace")
                except OSError:  # it has ended
                    assert re.search(pattern, self.shown, re.DOTALL), self.shown
        self.shown = self.shown[found.end() :]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        os.close(self._keyboard)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    opened = Terminal(tmp_path)
    yield opened
    opened.close()


def test_a_terminal_session(terminal: Terminal, tmp_path: Path) -> None:
    terminal.wait_for(READY)
    terminal.press(pasted("one\ntwo") + ENTER)
    terminal.wait_for(r"HEARD 'one\\ntwo' 1\s.*0 1\s.*" + READY)
    terminal.press("count" + ENTER)
    terminal.wait_for(r"HEARD 'count' 3\s.*0 1 2 3")
    terminal.press(CTRL_C)
    terminal.wait_for(r"\(stopped\).*" + READY)
    terminal.press("never mind" + CTRL_C)
    terminal.wait_for(r"leaves\).*" + READY)
    terminal.press("go on" + ENTER)
    terminal.wait_for(r"HEARD 'go on' 5\s.*" + READY)
    terminal.press(CTRL_D)
    terminal.wait_for("LEFT")
    assert terminal.process.wait(30) == 0
    history = tmp_path / "compiledllm" / "chat_history"
    assert stat.S_IMODE(history.stat().st_mode) == 0o600 and "+two" in history.read_text()
