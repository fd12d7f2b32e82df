"""The chat page's script, in node with a stand-in for the browser (`page_script.js`)."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import compiledllm.server

NODE = shutil.which("node")
PAGE = Path(compiledllm.server.__file__).with_name("page.html")

pytestmark = pytest.mark.skipif(NODE is None, reason="needs node (18 or newer)")


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    """What each scenario saw."""
    script = Path(__file__).with_name("page_script.js")
    done = subprocess.run(
        [str(NODE), str(script), str(PAGE)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def user(text: str) -> list[str]:
    return ["user", text]


def assistant(text: str) -> list[str]:
    return ["assistant", text]


def error(text: str) -> list[str]:
    return ["error", text + " Try again"]


def test_a_conversation_goes_on_with_what_was_said(seen: dict[str, Any]) -> None:
    turns = seen["two_turns"]
    assert turns["busy"] and turns["count"] == 2, "nothing is sent while an answer comes"
    assert turns["history"] == [user("one"), assistant("abc"), user("two")]
    assert turns["fields"]["seed"] == 7 and turns["fields"]["temperature"] == 0.7
    assert "max_completion_tokens" not in turns["fields"]  # its field is empty


def test_a_new_chat_knows_nothing_of_the_answer_that_was_coming(seen: dict[str, Any]) -> None:
    new = seen["new_chat_during_an_answer"]
    assert new["idle"] and new["busy"], "the old answer's end is not the new one's"
    assert new["shown"] == [user("new"), assistant("new answer")]
    assert new["history"] == [user("new")]


def test_enter_that_ends_a_composition_sends_nothing(seen: dict[str, Any]) -> None:
    assert seen["composition"] == {"prevented": [False] * 4, "before": 0, "after": 1}


def test_an_error_stands_where_the_answer_would_and_can_be_tried_again(
    seen: dict[str, Any],
) -> None:
    refused = seen["refused_and_again"]
    assert refused["shown"] == [user("hello"), error("too warm")]
    assert not refused["busy"] and refused["retry"] == 1
    assert refused["after"] == [user("hello"), assistant("hi")]
    assert refused["history"] == [user("hello"), assistant("hi"), user("next")]
    assert refused["left"] == 0


def test_every_failure_is_told_and_leaves_no_half_turn(seen: dict[str, Any]) -> None:
    failed = seen["errors"]
    assert failed["seen"] == [
        error("the server cannot be reached"),
        error("the server answered 502"),
        error("the engine stopped"),
        error("the answer broke off"),
    ]
    assert failed["history"] == [user("last")]
    assert failed["kinds"] == ["user", "error"] * 4 + ["user"]  # no empty bubbles


def test_an_answer_that_was_stopped_is_kept(seen: dict[str, Any]) -> None:
    stopped = seen["stopped"]
    assert stopped["history"] == [user("count"), assistant("one two"), user("go on")]
    assert not stopped["busy"]
    assert stopped["shown"] == [user("count"), assistant("one two"), user("go on")]
