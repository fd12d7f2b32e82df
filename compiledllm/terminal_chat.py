"""`compiledllm chat`: a conversation in the terminal, or through pipes.

Turns are read with prompt_toolkit in a terminal, and line by line otherwise. Knows only that the
engine streams answers to conversations.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from compiledllm.outputs import RequestOutput
from compiledllm.sampling_params import SamplingParams

if TYPE_CHECKING:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    from compiledllm.engine.engine import Engine

PROMPT, QUOTES = "> ", '"""'
SHORT_HELP = '/help lists commands, """ begins a text of several lines, Ctrl-C stops an answer'
HELP = '''/clear or /new    forget the conversation
/system TEXT      set the system prompt; without TEXT, remove it
/exit or Ctrl-D   leave (also /quit, /bye)
/help or /?       this list
"""               begin and end a text of several lines; Alt-Enter breaks a line, too
Ctrl-C            stop the answer, or clear the line'''
_COMMAND = re.compile(r"/[a-z?]+(?= |$)")

Message = dict[str, str]


class Chat:
    """The conversation so far, which each turn of the user extends or changes."""

    def __init__(
        self,
        engine: Engine,
        params: SamplingParams,
        system: str | None = None,
        shows_speed: bool = True,
    ) -> None:
        self._engine = engine
        self._params = params
        self._shows_speed = shows_speed
        self._system = _system(system)
        self._history: list[Message] = []

    def run(self) -> None:
        for text in turns():
            if not self.take(text):
                return

    def take(self, text: str) -> bool:
        """Answer a question or obey a command. False if the command ends the chat."""
        command = _COMMAND.match(text) if "\n" not in text else None
        if command is not None:
            return self._obey(command.group(), text[command.end() :].strip())
        if text:
            self._ask(text)
        return True

    def _obey(self, command: str, rest: str) -> bool:
        if command in ("/exit", "/quit", "/bye"):
            return False
        if command in ("/clear", "/new"):
            self._history = []
            print("(a new conversation)")
        elif command == "/system":
            self._system = _system(rest)
        elif command in ("/help", "/?"):
            print(HELP)
        else:
            print(f"there is no command {command}; /help lists the commands")
        return True

    def _ask(self, question: str) -> None:
        messages = [*self._history, {"role": "user", "content": question}]
        answer = self._answer(self._system + messages)
        if answer:
            self._history = [*messages, {"role": "assistant", "content": answer}]

    def _answer(self, messages: list[Message]) -> str:
        """Print one answer as it streams. Returns its text, up to Ctrl-C; "" after an error."""
        text = ""
        output: RequestOutput | None = None
        try:
            with contextlib.closing(self._engine.stream_chat(messages, self._params)) as outputs:
                for output in outputs:
                    new = output.outputs[0].text
                    print(new[len(text) :], end="", flush=True)
                    text = new
            print()
        except KeyboardInterrupt:
            print("\n(stopped)")
            return text
        except ValueError as error:
            print(f"error: {error}; /clear starts a new conversation", file=sys.stderr)
            return ""
        if output is not None and self._shows_speed:
            print(speed(output), file=sys.stderr)
        return text


def _system(text: str | None) -> list[Message]:
    return [{"role": "system", "content": text}] if text else []


def speed(output: RequestOutput) -> str:
    """One line: tokens, tokens per second after the first, time to first token."""
    metrics, count = output.metrics, len(output.outputs[0].token_ids)
    assert metrics is not None and metrics.first_token_time is not None
    ttft = metrics.first_token_time - metrics.arrival_time
    rest = metrics.last_token_time - metrics.first_token_time
    rate = f"{(count - 1) / rest:.1f} tokens/s" if count > 1 else "one token"
    prompt = len(output.prompt_token_ids)
    reason = output.outputs[0].finish_reason
    return (
        f"[{prompt} prompt tokens, {count} generated ({reason}); "
        f"{rate}, first after {ttft * 1e3:.0f} ms]"
    )


# -- what the user types ---------------------------------------------------------------------------


def turns() -> Iterator[str]:
    """The user's turns, until the end of input."""
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    return typed_turns(history_path()) if is_terminal else _piped_turns()


def typed_turns(history: Path) -> Iterator[str]:
    """Turns typed with line editing. Ctrl-C clears the line; a pasted text is one turn."""
    session = _session(history)
    while True:
        try:
            yield _unquoted(session.prompt(PROMPT))
        except EOFError:
            return
        except KeyboardInterrupt:
            print("(Ctrl-D or /exit leaves)")


def _piped_turns() -> Iterator[str]:
    """One turn per line, except for texts between triple quotes."""
    while True:
        try:
            text = input()
            while _is_open(text):
                text += "\n" + input()
            yield _unquoted(text)
        except EOFError:
            return


def _is_open(text: str) -> bool:
    """Whether a text in triple quotes continues on the next line."""
    text = text.strip()
    return text.startswith(QUOTES) and (len(text) < 2 * len(QUOTES) or not text.endswith(QUOTES))


def _unquoted(text: str) -> str:
    text = text.strip()
    is_quoted = text.startswith(QUOTES) and not _is_open(text)
    return text[len(QUOTES) : -len(QUOTES)].strip("\r\n") if is_quoted else text


def _session(history: Path) -> PromptSession[str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    try:
        make_private(history)
    except OSError as error:
        print(f"(no history of what you type is kept: {error})", file=sys.stderr)
        kept: FileHistory | InMemoryHistory = InMemoryHistory()
    else:
        kept = FileHistory(str(history))
    return PromptSession(
        history=kept,
        key_bindings=_key_bindings(),
        multiline=True,  # Enter is bound below
        prompt_continuation="  ",
    )


def _key_bindings() -> KeyBindings:
    from prompt_toolkit.key_binding import KeyBindings

    bindings = KeyBindings()

    @bindings.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if _is_open(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings


def history_path() -> Path:
    """The file of typed turns, in $XDG_STATE_HOME or ~/.local/state."""
    state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(state).expanduser() / "compiledllm" / "chat_history"


def make_private(path: Path) -> None:
    """Create the file if it is missing, readable and writable by its owner only."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND, 0o600)
    try:
        os.chmod(path, 0o600)
    finally:
        os.close(file)
