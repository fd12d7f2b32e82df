"""The chat page in a real browser.

The answers come from a real server whose model repeats what it was asked, or, where their timing or
their failing matters, from the test (`page_model.js`).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients.scripted_server import scripted_server
from tests.support.server import Server, wait_for

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
expect = sync_api.expect
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
FOLDER = Path(__file__).parent
CHECKS = (FOLDER / "page_checks.js").read_text()
FROM_TEST = (FOLDER / "page_model.js").read_text()  # answers come from the test
PHONE = {"width": 360, "height": 640}
DESK = {"width": 1280, "height": 800}
WEATHER = {"tools": [{"type": "function", "function": {"name": "weather", "parameters": {}}}]}

pytestmark = [
    pytest.mark.real_model,  # its tokenizer
    pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome"),
]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    options = ("--root-path", "/llm")
    with scripted_server([], *options, engine="tests.server.echo_engine") as server:
        yield server


@pytest.fixture(scope="module")
def window() -> Iterator[Any]:
    """A browser's window, of which all pages are tabs."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        permissions = ["clipboard-read", "clipboard-write"]
        window = browser.new_context(viewport=DESK, permissions=permissions)
        window.set_default_timeout(20_000)
        yield window
        browser.close()


@pytest.fixture
def open_page(window: Any, server: Server) -> Iterator[Callable[..., Any]]:
    """open_page(script=None) -> a page, on which nothing may go wrong.

    script: runs before the page's own. The first page of a test finds nothing in the storage.
    """
    pages: list[Any] = []

    def open_one(script: str = "") -> Any:
        page = window.new_page()
        page.asked, page.problems = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("console", lambda line: note(page, line))
        page.add_init_script(CHECKS + script)
        if not pages:
            what = {"origin": server.url, "storageTypes": "local_storage"}
            window.new_cdp_session(page).send("Storage.clearDataForOrigin", what)
        page.goto(server.url)
        expect(page.locator("#model")).to_have_text("tiny")
        pages.append(page)
        return page

    yield open_one
    for page in pages:
        page.close()
        assert page.problems == []
        allowed = (server.url, "data:", "blob:")
        assert all(url.startswith(allowed) for url in page.asked), page.asked


def note(page: Any, line: Any) -> None:
    if line.type == "error" and not re.search(r"status of 4\d\d|ERR_FAILED", line.text):
        page.problems.append(line.text)


@pytest.fixture
def page(open_page: Callable[..., Any]) -> Any:
    """Its answers come from the server."""
    return open_page()


@pytest.fixture
def scripted(open_page: Callable[..., Any]) -> Any:
    """Its answers come from the test."""
    return open_page(script=FROM_TEST)


def begin(page: Any, text: str) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def ask(page: Any, text: str) -> None:
    begin(page, text)
    expect(page.locator("#stop")).to_be_hidden()


def set_fields(page: Any, **fields: str) -> None:
    page.click("#settings > summary")
    for name, value in fields.items():
        page.fill("#" + name, value)
    page.click("#settings > summary")


def answer(page: Any, index: int, script: str) -> None:
    """Run a script with `answer` as the index-th answer, and let the page take it in."""
    page.wait_for_function("index => window.answers.length > index", arg=index)
    page.evaluate(f"async () => {{ const answer = window.answers[{index}]; {script} }}")
    page.evaluate("() => new Promise((done) => setTimeout(done, 30))")


def shown(page: Any) -> list[tuple[str, str]]:
    """Kind and text of what stands in the log."""
    script = """nodes => nodes.filter((node) => !node.hidden)
        .map((node) => [node.className.split(" ")[1], node.textContent])"""
    return [(kind, text) for kind, text in page.eval_on_selector_all(".message", script)]


def asked(page: Any, index: int) -> list[tuple[str, str]]:
    messages = page.evaluate(f"window.answers[{index}].asked.messages")
    return [(message["role"], message["content"]) for message in messages]


def titles(page: Any) -> list[str]:
    found: list[str] = page.locator(".open-chat").all_inner_texts()
    return found


def user(text: str) -> tuple[str, str]:
    return ("user", text)


def assistant(text: str) -> tuple[str, str]:
    return ("assistant", text)


def error(text: str) -> tuple[str, str]:
    return ("error", text + " Try again")


# -- an answer ------------------------------------------------------------------------------------


def test_an_answer_streams_with_its_figures(page: Any) -> None:
    expect(page.locator("#model")).to_have_text("tiny")
    ask(page, "Hello there")
    assert page.locator(".user").inner_text() == "Hello there"
    assert page.locator(".assistant").inner_text() == "Hello there"
    facts = page.locator(".facts").inner_text()
    assert re.fullmatch(r"first token \d+ ms · 3 tokens · [\d.]+ tokens/s", facts)
    assert re.fullmatch(r"prompt \d+ tokens", page.locator(".usage").inner_text())
    page.fill("#prompt", "And again")
    page.click("#send")
    expect(page.locator(".usage")).to_have_count(2)
    expect(page.locator(".usage").last).to_contain_text("prompt")
    page.click("#clear")
    assert page.locator(".message").count() == 0
    loaded = [url for url in page.asked if not url.startswith("data:") and "/v1/" not in url]
    assert len(loaded) == 1, "one file as served"


def test_a_page_that_has_not_changed_is_not_sent_again(page: Any, server: Server) -> None:
    etag = page.goto(page.url).headers["etag"]
    assert server.get("/", if_none_match=etag) == (304, "")
    assert server.get("/", if_none_match='"another"')[1].startswith("<!doctype html>")


@pytest.mark.parametrize("path", ["/llm", "/llm/"])
def test_the_page_works_below_a_path(page: Any, server: Server, path: str) -> None:
    page.asked.clear()
    page.goto(server.url + path)
    ask(page, "Hello")
    assert shown(page) == [user("Hello"), assistant("Hello")]
    asked = [url.removeprefix(server.url) for url in page.asked if "/v1/" in url]
    assert asked == ["/llm/v1/models", "/llm/v1/chat/completions"]


def test_tokens_of_the_prefix_cache_are_shown(scripted: Any) -> None:
    begin(scripted, "x")
    usage = {"prompt_tokens": 90, "completion_tokens": 2, "total_tokens": 92}
    usage["prompt_tokens_details"] = {"cached_tokens": 64}  # type: ignore[assignment]
    script = (
        'answer.begin(); answer.delta({content: "y"}); answer.delta({}, {finish_reason: "length"});'
    )
    answer(scripted, 0, f"{script} answer.end({json.dumps(usage)});")
    expect(scripted.locator(".usage")).to_have_text("prompt 90 tokens, 64 cached")
    expect(scripted.locator(".facts")).to_contain_text("2 tokens")
    expect(scripted.locator(".facts")).to_contain_text("cut off")


def test_an_answer_can_be_stopped(page: Any, server: Server) -> None:
    begin(page, "again and " * 2000)
    expect(page.locator(".assistant")).to_have_text(re.compile(".{20}", re.DOTALL))
    page.keyboard.press("Escape")
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator(".facts")).to_contain_text("stopped")
    idle = 'num_requests_running{model_name="tiny"} 0'
    wait_for(lambda: idle in server.get("/metrics")[1])


def test_a_conversation_goes_on_with_what_was_said(scripted: Any) -> None:
    set_fields(scripted, seed="7", temperature="0.7")
    begin(scripted, "one")
    begin(scripted, "ignored while busy")
    answer(
        scripted,
        0,
        """answer.begin(); answer.say('data: {"choices": [{"delta": {"content": "a');""",
    )
    answer(
        scripted,
        0,
        """answer.say('b"}}]}\\n\\ndata: {"choices": []}\\n'); answer.delta({content: "c"});
        answer.end();""",
    )
    assert scripted.evaluate("answers.length") == 1, "nothing is sent while an answer comes"
    begin(scripted, "two")
    assert asked(scripted, 1) == [user("one"), assistant("abc"), user("two")]
    fields = scripted.evaluate("answers[1].asked")
    assert fields["seed"] == 7 and fields["temperature"] == 0.7
    assert "max_completion_tokens" not in fields  # its field is empty


def test_enter_that_ends_a_composition_sends_nothing(scripted: Any) -> None:
    scripted.fill("#prompt", "にほん")
    for event in (
        {"key": "Enter", "isComposing": True},
        {"key": "Enter", "keyCode": 229},
        {"key": "Enter", "shiftKey": True},
    ):
        prevented = """event => !$("prompt").dispatchEvent(new KeyboardEvent("keydown",
            {bubbles: true, cancelable: true, ...event}))"""
        assert not scripted.evaluate(prevented, event)
    assert scripted.evaluate("answers.length") == 0
    scripted.press("#prompt", "Enter")
    assert scripted.evaluate("answers.length") == 1


def test_the_input_grows_with_its_text(page: Any) -> None:
    height = "$('prompt').offsetHeight"
    before = page.evaluate(height)
    page.fill("#prompt", "line\n" * 5)
    grown = page.evaluate(height)
    page.fill("#prompt", "line\n" * 500)
    assert before < grown < page.evaluate(height) <= 0.45 * DESK["height"]
    assert shown(page) == []


def test_reasoning_is_folded(page: Any) -> None:
    ask(page, "<think>Perhaps **so**.</think>It is so.")
    expect(page.locator(".assistant")).to_have_text("It is so.")
    assert not page.locator(".reasoning").evaluate("node => node.open")
    page.click(".reasoning summary")
    expect(page.locator(".reasoning-text strong")).to_have_text("so")


def test_calls_of_tools_are_shown_and_can_be_answered(page: Any) -> None:
    set_fields(page, further=json.dumps(WEATHER))
    call = {"name": "weather", "arguments": {"city": "Oslo"}}
    ask(page, f"<tool_call>\n{json.dumps(call)}\n</tool_call>")
    expect(page.locator(".calls .code-head")).to_contain_text("weather")
    expect(page.locator(".calls pre")).to_have_text('{\n  "city": "Oslo"\n}')
    page.fill(".results textarea", "12 degrees")
    page.click(".results button")
    expect(page.locator(".assistant").last).to_have_text("12 degrees")
    assert page.locator(".results").count() == 0
    ask(page, "thanks")
    assert shown(page)[-1] == assistant("thanks")


# -- what fails -----------------------------------------------------------------------------------


def test_every_failure_is_told_and_leaves_no_half_turn(scripted: Any) -> None:
    failures = {
        'answer.reject(new TypeError("Failed to fetch"))': "the server cannot be reached",
        'answer.refuse(502, "<h1>Bad gateway</h1>")': "the server answered 502",
        'answer.refuse(500, "[]")': "the server answered 500",
        "answer.begin(); answer.fail('the engine stopped')": "the engine stopped",
        "answer.begin(); answer.controller.close()": "the answer broke off",
        'answer.begin(); answer.say("data: {\\n\\n")': "the answer broke off",
        "answer.begin(); answer.end()": "the model answered nothing",
    }
    for index, (script, text) in enumerate(failures.items()):
        begin(scripted, f"try {index}")
        answer(scripted, index, script)
        assert shown(scripted)[-1] == error(text)
        assert [kind for kind, _ in shown(scripted)] == ["user"] * (index + 1) + ["error"]
    begin(scripted, "last")
    assert asked(scripted, len(failures)) == [user("last")]


def test_an_error_stands_where_the_answer_would_and_can_be_tried_again(scripted: Any) -> None:
    begin(scripted, "hello")
    answer(scripted, 0, """answer.refuse(400, '{"error": {"message": "too warm"}}')""")
    assert shown(scripted) == [user("hello"), error("too warm")]
    expect(scripted.locator("#send")).to_be_visible()
    scripted.click(".retry")
    answer(scripted, 1, 'answer.whole("hi")')
    assert shown(scripted) == [user("hello"), assistant("hi")]
    begin(scripted, "next")
    assert asked(scripted, 2) == [user("hello"), assistant("hi"), user("next")]


def test_an_overloaded_server_and_a_full_context_are_told_with_the_way_out(scripted: Any) -> None:
    full = "the prompt has 9000 tokens and max_model_len=2048 leaves room for 2047; shorten it"
    for index, (status, message, told) in enumerate(
        (
            (429, "9 requests wait", "the server is busy: 9 requests wait (try again in 3 s)"),
            (503, "it loads", "the server is busy: it loads (try again in 3 s)"),
            (400, full, full + ". Start a new chat, or edit an earlier message."),
        )
    ):
        begin(scripted, "x")
        body = json.dumps({"error": {"message": message}})
        answer(scripted, index, f"answer.refuse({status}, {body!r}, {{'retry-after': '3'}})")
        assert shown(scripted)[-1] == error(told)


def test_an_answer_that_broke_off_is_kept_until_it_is_tried_again(scripted: Any) -> None:
    begin(scripted, "go")
    answer(
        scripted, 0, 'answer.begin(); answer.delta({content: "half"}); answer.controller.close()'
    )
    assert shown(scripted) == [user("go"), assistant("half"), error("the answer broke off")]
    scripted.click(".retry")
    assert asked(scripted, 1) == [user("go")]
    answer(scripted, 1, 'answer.whole("whole")')
    assert shown(scripted) == [user("go"), assistant("whole")]


def test_a_server_that_wants_a_key_gets_one(scripted: Any) -> None:
    page = scripted
    begin(page, "hello")
    answer(page, 0, """answer.refuse(401, '{"error": {"message": "the API key is missing"}}')""")
    page.fill(".key-form input", "sécret-key\u200b")  # a header cannot have all of it
    page.click(".key-form button")
    answer(page, 1, 'answer.whole("hi")')
    assert page.evaluate("answers[1].key") == "Bearer scret-key"
    assert shown(page) == [user("hello"), assistant("hi")]
    page.reload()
    begin(page, "more")
    assert page.evaluate("answers[0].key") == "Bearer scret-key"
    stored = page.evaluate("JSON.stringify({...localStorage})")
    assert "scret" not in stored, "a key does not outlive its tab"


def test_a_server_that_comes_back_is_noticed(page: Any) -> None:
    page.route("**/v1/models", lambda route: route.abort())
    page.reload()
    expect(page.locator("#notice")).to_have_text("the server cannot be reached")
    page.unroute("**/v1/models")
    expect(page.locator("#notice")).to_be_hidden()
    expect(page.locator("#model")).to_have_text("tiny")


# -- conversations --------------------------------------------------------------------------------


def test_conversations_are_kept_listed_renamed_and_deleted(page: Any) -> None:
    ask(page, "First question")
    page.click("#clear")
    ask(page, "Second question")
    assert titles(page) == ["Second question", "First question"]
    page.reload()
    page.click(".open-chat >> text=First question")
    assert shown(page) == [user("First question"), assistant("First question")]
    choose(page, "Second question", "Rename")
    page.keyboard.type("Renamed")
    page.keyboard.press("Enter")
    assert sorted(titles(page)) == ["First question", "Renamed"]
    choose(page, "First question", "Delete")
    assert titles(page) == ["Renamed"] and shown(page) == []
    page.click("#toast button")
    assert sorted(titles(page)) == ["First question", "Renamed"]
    choose(page, "Renamed", "Delete")
    page.reload()
    assert titles(page) == ["First question"]


def choose(page: Any, title: str, action: str) -> None:
    page.click(f'[aria-label="Actions for {title}"]')
    page.click(f"#menu >> text={action}")


def test_a_new_chat_knows_nothing_of_the_answer_that_comes_in_another(scripted: Any) -> None:
    begin(scripted, "old")
    answer(scripted, 0, 'answer.begin(); answer.delta({content: "old answer"})')
    scripted.click("#clear")
    expect(scripted.locator("#send")).to_be_visible()
    begin(scripted, "new")
    answer(scripted, 0, 'answer.delta({content: " goes on"}); answer.end()')
    expect(scripted.locator("#stop")).to_be_visible()  # the old answer's end is not the new one's
    answer(scripted, 1, 'answer.whole("new answer")')
    assert shown(scripted) == [user("new"), assistant("new answer")]
    assert asked(scripted, 1) == [user("new")]
    scripted.click(".open-chat >> text=old")
    assert shown(scripted) == [user("old"), assistant("old answer goes on")]


def test_a_deleted_conversation_stops_its_answer_and_stays_away(scripted: Any) -> None:
    begin(scripted, "old")
    answer(scripted, 0, 'answer.begin(); answer.delta({content: "some"})')
    choose(scripted, "old", "Delete")
    answer(scripted, 0, "")
    assert scripted.evaluate("answers[0].isStopped")
    assert titles(scripted) == [] and shown(scripted) == []


def test_a_message_is_edited_and_an_answer_made_again(scripted: Any) -> None:
    for index, text in enumerate(("one", "two")):
        begin(scripted, text)
        answer(scripted, index, f'answer.whole("{text}!")')
    scripted.click("[aria-label='Answer again'] >> nth=1")
    assert asked(scripted, 2) == [user("one"), assistant("one!"), user("two")]
    answer(scripted, 2, 'answer.whole("again")')
    assert shown(scripted)[2:] == [user("two"), assistant("again")]
    scripted.press("#prompt", "ArrowUp")  # edits the last question
    scripted.press(".editor textarea", "Escape")
    assert len(shown(scripted)) == 4
    scripted.locator(".by-user").first.hover()
    scripted.click("[aria-label='Edit'] >> nth=0")
    scripted.fill(".editor textarea", "three")
    scripted.press(".editor textarea", "Enter")
    assert asked(scripted, 3) == [user("three")]
    answer(scripted, 3, 'answer.whole("three!")')
    scripted.click("[aria-label='Edit'] >> nth=1")
    scripted.fill(".editor textarea", "my own words")
    scripted.click(".editor >> text=Save")
    begin(scripted, "four")
    assert asked(scripted, 4) == [user("three"), assistant("my own words"), user("four")]


def test_a_conversation_is_exported_and_imported(page: Any, tmp_path: Path) -> None:
    ask(page, "<think>Hm.</think>An *answer*")
    for action, suffix in (("Export as JSON", ".json"), ("Export as Markdown", ".md")):
        with page.expect_download() as download:
            choose(page, page.locator(".open-chat").inner_text(), action)
        assert download.value.suggested_filename == f"think-Hm-think-An-answer{suffix}"
        download.value.save_as(tmp_path / f"chat{suffix}")
    text = (tmp_path / "chat.md").read_text()
    assert "## User\n\n<think>" in text and "## Assistant\n\n> Hm.\n\nAn *answer*" in text
    exported = json.loads((tmp_path / "chat.json").read_text())["conversations"][0]
    assert exported["messages"][1]["reasoning"] == "Hm."
    page.evaluate("localStorage.clear()")
    page.reload()
    assert titles(page) == []
    page.set_input_files("#import-file", tmp_path / "chat.json")
    page.click(".open-chat")
    assert [text for _, text in shown(page)] == ["<think>Hm.</think>An *answer*", "An answer"]
    (tmp_path / "none.json").write_text('{"messages": 3}')
    page.set_input_files("#import-file", tmp_path / "none.json")
    expect(page.locator("#toast")).to_contain_text("holds no conversations")


def test_settings_are_kept_and_sent(scripted: Any) -> None:
    page = scripted
    set_fields(page, system="Be brief.", top_k="5", max_tokens="9", further='{"stop": ["END"]}')
    page.select_option("#models", "other-name")
    page.reload()
    expect(page.locator("#model")).to_have_text("other-name")
    begin(page, "hi")
    body = page.evaluate("answers[0].asked")
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (body["top_k"], body["max_completion_tokens"], body["stop"]) == (5, 9, ["END"])
    assert body["model"] == "other-name"
    answer(page, 0, 'answer.whole("x")')
    page.click("#clear")
    set_fields(page, further="{stop", system="Be long.")
    begin(page, "more")
    assert "further fields are no JSON" in shown(page)[-1][1]
    page.click(".open-chat >> text=hi")
    expect(page.locator("#system")).to_have_value("Be brief.")
    set_fields(page, top_p="0.5")
    page.click("#clear")
    expect(page.locator("#system")).to_have_value("Be long.")


# -- storage --------------------------------------------------------------------------------------

NO_STORAGE = """for (const name of ["localStorage", "sessionStorage"])
    Object.defineProperty(window, name,
        {get() { throw new DOMException("no", "SecurityError"); }});"""
FULL_STORAGE = """Storage.prototype.setItem = () => {
    throw new DOMException("full", "QuotaExceededError"); };"""


@pytest.mark.parametrize(
    ("script", "told"), [(NO_STORAGE, "no storage"), (FULL_STORAGE, "is full")]
)
def test_the_page_works_where_nothing_can_be_kept(
    open_page: Callable[..., Any], script: str, told: str
) -> None:
    page = open_page(script=script)
    set_fields(page, system="Be brief.")
    ask(page, "one")
    expect(page.locator("#notice")).to_contain_text(told)
    ask(page, "two")
    assert shown(page) == [user("one"), assistant("one"), user("two"), assistant("two")]
    page.click("#clear")
    ask(page, "three")
    assert titles(page) == ["three", "one"], "no copies"
    page.click(".open-chat >> text=one")
    assert len(shown(page)) == 4


def test_tabs_do_not_destroy_each_others_conversations(open_page: Callable[..., Any]) -> None:
    first = open_page(script=FROM_TEST)
    begin(first, "shared")
    answer(first, 0, 'answer.whole("yes")')
    second = open_page(script=FROM_TEST)
    begin(second, "of the second")
    answer(second, 0, 'answer.whole("yes")')
    expect(first.locator(".open-chat")).to_have_count(2)
    second.click(".open-chat >> text=shared")
    begin(first, "from first")  # both at once, in the same conversation
    expect(second.locator(".user").last).to_have_text("from first")
    begin(second, "from second")
    answer(first, 1, 'answer.whole("to first")')
    answer(second, 1, 'answer.whole("to second")')
    assert shown(first)[2:] == [user("from first"), assistant("to first")]
    both = [user("from first"), user("from second"), assistant("to second")]
    assert shown(second)[2:] == both
    first.reload()
    assert sorted(titles(first)) == ["of the second", "shared", "shared (copy)"]
    kept = first.evaluate("chats.list().map((chat) => chat.messages.at(-1).content)")
    assert sorted(kept) == ["to first", "to second", "yes"]
    choose(second, "of the second", "Delete")
    expect(first.locator(".open-chat")).to_have_count(2)


def test_what_others_wrote_into_the_storage_is_no_hindrance(page: Any) -> None:
    ask(page, "mine")
    calls = {"role": "assistant", "tool_calls": [None, {"function": 5}], "figures": {"tokens": "x"}}
    chat = json.dumps({"messages": [None, 3, {"role": "root"}, calls]})
    for index, text in enumerate(("null", "{", "[]", chat)):
        page.evaluate("([name, text]) => localStorage.setItem(CHAT + name, text)", [index, text])
    page.evaluate("localStorage.setItem(PREFIX + 'settings', '7')")
    page.reload()
    assert sorted(titles(page)) == ["New chat", "mine"]
    page.click(".open-chat >> text=New chat")
    page.click(".open-chat >> text=mine")
    assert len(shown(page)) == 2


# -- what models write ----------------------------------------------------------------------------

ATTACKS = (FOLDER / "page_attacks.txt").read_text()
TAGS = {f"h{depth}" for depth in range(1, 7)} | {
    *("a", "b", "blockquote", "br", "button", "code", "del", "div", "em", "hr", "i", "kbd", "li"),
    *("mark", "ol", "p", "pre", "s", "span", "strong", "sub", "sup", "table", "tbody", "td", "th"),
    *("thead", "tr", "u", "ul"),
}
ATTRIBUTES = {"class", "href", "title", "target", "rel", "style", "tabindex", "start", "type"}
CLASSES = r"hljs-[a-z_-]+( [a-z_]+)*|code|code-head|call-name|copy-code|plain|table|task|math"


def check_harmless(page: Any, root: str) -> None:
    found = page.evaluate("root => elementsIn(root)", root)
    assert {tag for tag, *_ in found} <= TAGS
    assert {name for _, names, *_ in found for name in names} <= ATTRIBUTES
    links = [href for _, _, href, _ in found if href is not None]
    assert all(re.match("https?://|mailto:", href) for href in links), links
    assert all(re.fullmatch(CLASSES, name) for *_, name in found if name), found
    assert page.evaluate("window.attacked") is None


def test_nothing_that_a_model_writes_runs_or_is_fetched(scripted: Any) -> None:
    function = {"name": ATTACKS, "arguments": json.dumps({"city": ATTACKS})}
    calls = [{"index": 0, "id": "x", "function": function}]
    begin(scripted, ATTACKS)
    scripted.evaluate("answers[0].begin()")
    for delta in ({"reasoning": ATTACKS}, {"content": ATTACKS}, {"tool_calls": calls}):
        scripted.evaluate("delta => answers[0].delta(delta)", delta)
    answer(scripted, 0, "answer.end()")
    scripted.click(".reasoning summary")
    for root in (".user", ".assistant", ".reasoning-text", ".calls .code"):
        check_harmless(scripted, root)
    content = scripted.locator(".assistant")
    assert "<script>" in content.inner_text()  # as text
    assert content.locator("b").all_inner_texts() == ["plain bold"]
    good = content.locator("a[href='https://good.example/']")
    assert good.get_attribute("rel") == "noopener noreferrer nofollow"


def test_nothing_that_a_file_holds_runs(page: Any, tmp_path: Path) -> None:
    calls = [{"id": ATTACKS, "type": ATTACKS, "function": {"name": ATTACKS, "arguments": ATTACKS}}]
    messages = [
        {"role": "user", "content": ATTACKS},
        {"role": "assistant", "content": ATTACKS, "reasoning": ATTACKS, "tool_calls": calls},
        {"role": "tool", "tool_call_id": ATTACKS, "content": ATTACKS},
        {"role": "assistant", "content": "ok", "ended": ATTACKS, "figures": {"tokens": ATTACKS}},
    ]
    title = "<img src=x onerror='window.attacked=true'>"
    chat = {"id": ATTACKS, "title": title, "system": ATTACKS, "messages": messages}
    (tmp_path / "chat.json").write_text(
        json.dumps({"__proto__": {"x": 1}, "conversations": [chat]})
    )
    page.set_input_files("#import-file", tmp_path / "chat.json")
    expect(page.locator(".open-chat")).to_have_text(title)
    page.click(".open-chat")
    page.click(".reasoning summary")
    assert page.title().startswith(title)
    for root in (".assistant", ".reasoning-text", ".calls .code", ".user", ".tool"):
        check_harmless(page, root)
    with page.expect_download() as download:
        choose(page, title.replace("'", "\\'"), "Export as Markdown")
    assert re.fullmatch(r"[\w-]+\.md", download.value.suggested_filename)


def test_the_policy_lets_nothing_else_run(page: Any) -> None:
    failed: dict[str, str] = {}
    page.on("requestfailed", lambda request: failed.update({request.url: request.failure}))
    policy = page.goto(page.url).headers["content-security-policy"]
    assert "unsafe" not in policy and "http:" not in policy and "*" not in policy
    for script in (
        "document.body.innerHTML = '<img src=x onerror=window.attacked=true>'",
        "add('script', {text: 'window.attacked = true'})",
        "new Function('window.attacked = true')()",
        "fetch('https://evil.example')",
        "add('img', {src: 'https://evil.example/x'})",
    ):  # on their own, as the policy does not bind what the debugger evaluates itself
        page.evaluate(
            """script => setTimeout(eval(`() => {
                const add = (tag, more) =>
                    document.body.append(Object.assign(document.createElement(tag), more));
                ${script}; }`))""",
            script,
        )
    page.wait_for_timeout(300)
    assert page.evaluate("window.attacked") is None
    assert page.problems
    assert all(failed[url] == "csp" for url in page.asked if "evil" in url)
    page.problems.clear()
    page.asked.clear()


# -- Markdown -------------------------------------------------------------------------------------

MARKDOWN = json.loads((FOLDER / "page_markdown.json").read_text())


def test_markdown_is_shown_the_same_whether_it_comes_whole_or_in_pieces(page: Any) -> None:
    texts = [*MARKDOWN, "\n\n".join(MARKDOWN), "\r\n".join(MARKDOWN), ATTACKS]
    for text in texts:
        streamed, whole = page.evaluate("text => streamedAndWhole(text)", text)
        assert streamed == whole
        assert whole == MARKDOWN.get(text, whole)


def test_code_is_highlighted_and_copied(page: Any) -> None:
    code = "def f():\n    return '<b>' & \"x\""
    ask(page, f"```python\n{code}\n```\n\n```unknown\n{code}\n```")
    assert page.locator(".code").first.locator(".hljs-keyword").all_inner_texts() == [
        "def",
        "return",
    ]
    assert page.locator(".code").nth(1).locator("code span").count() == 0
    page.locator(".copy-code").first.click()
    expect(page.locator(".copy-code").first).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == code
    page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")  # plain HTTP
    page.evaluate("document.execCommand = () => (window.copied = getSelection().toString(), true)")
    page.locator(".copy-code").nth(1).click()
    assert page.evaluate("window.copied") == code


def test_a_long_answer_is_not_read_again_with_every_token(page: Any) -> None:
    """10,000 tokens, of which each is shown: the characters that marked reads stay a few each."""
    assert page.evaluate("timesRead()") < 30  # 5,000 if all of it were read each time


def test_an_answer_is_shown_once_a_frame_at_most(scripted: Any) -> None:
    begin(scripted, "x")
    answer(scripted, 0, "answer.begin()")
    scripted.evaluate("countUpdates()")
    answer(scripted, 0, 'for (let i = 0; i < 2000; i += 1) answer.delta({content: "w "});')
    expect(scripted.locator(".assistant")).to_have_text(re.compile("(w ){1999}w"))
    assert scripted.evaluate("numUpdates") < 100
    answer(scripted, 0, "answer.end()")
    expect(scripted.locator(".facts")).to_contain_text("2000 tokens")


def test_hostile_text_does_not_freeze_the_page(page: Any) -> None:
    assert page.evaluate("hostileTextsNotShown()") == [], "nothing, or after more than 10 s"


# -- how it looks and is used ---------------------------------------------------------------------


def test_nothing_is_wider_than_a_phone(page: Any) -> None:
    page.set_viewport_size(PHONE)
    width = "document.documentElement.scrollWidth"
    long = "a" * 300
    table, code = f"|{long}|{long}|\n|-|-|\n|x|y|", f"```\n{long}\n```"
    ask(page, f"<think>{long}</think>\n# {long}\n\n{code}\n\n{table}\n\n- `{long}`")
    assert page.evaluate(width) <= 360
    page.click(".reasoning summary")
    page.click("#settings > summary")
    assert page.evaluate(width) <= 360
    page.click("#settings > summary")
    assert page.locator("#chats").is_hidden()
    page.click("#toggle")
    assert page.locator("#chats").is_visible() and page.evaluate(width) <= 360
    page.keyboard.press("Escape")
    assert page.locator("#chats").is_hidden()


TOUCH = """{ const real = matchMedia; window.matchMedia = (query) =>
    (query.includes("coarse") ? { matches: true } : real.call(window, query)); }"""


def test_a_keyboard_on_the_screen_begins_lines(open_page: Callable[..., Any]) -> None:
    page = open_page(script=FROM_TEST + TOUCH)
    page.fill("#prompt", "one")
    page.press("#prompt", "Enter")
    page.keyboard.type("two")
    page.click("#send")
    assert asked(page, 0) == [user("one\ntwo")]
    answer(page, 0, 'answer.whole("x")')
    assert page.evaluate("document.activeElement.id") != "prompt", "it would cover the answer"


def test_everything_that_can_be_used_has_a_name(page: Any) -> None:
    set_fields(page, further=json.dumps(WEATHER))
    call = json.dumps({"name": "weather", "arguments": {}})
    ask(page, "```\nx\n```")
    ask(page, f"<tool_call>\n{call}\n</tool_call>")
    page.click("[aria-label='Edit'] >> nth=0")
    nameless = """nodes => nodes.filter((node) => !(node.ariaLabel || node.textContent.trim()
        || node.labels?.[0]?.textContent.trim())).map((node) => node.outerHTML)"""
    assert page.eval_on_selector_all("button, input, select, textarea, summary", nameless) == []
    page.keyboard.press("Escape")
    page.keyboard.press("Control+Shift+O")
    assert shown(page) == []
    assert page.evaluate("document.activeElement.id") == "prompt"


def test_colours_follow_the_system(page: Any) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    page.emulate_media(color_scheme="light")
    light = page.evaluate(ground)
    page.emulate_media(color_scheme="dark")
    assert light == "rgb(255, 255, 255)" != page.evaluate(ground)


def test_a_reader_who_scrolled_up_is_left_there(scripted: Any) -> None:
    begin(scripted, "x")
    answer(scripted, 0, 'answer.begin(); answer.delta({content: "line\\n\\n".repeat(100)})')
    top = "$('log').scrollTop"
    at_end = "$('log').scrollHeight - $('log').scrollTop - $('log').clientHeight < 5"
    assert scripted.evaluate(at_end)
    scripted.evaluate("$('log').scrollTop = 100")
    answer(scripted, 0, 'answer.delta({content: "more\\n\\n".repeat(50)})')
    assert scripted.evaluate(top) == 100
    scripted.click("#to-end")
    answer(scripted, 0, 'answer.delta({content: "last\\n\\n"}); answer.end()')
    assert scripted.evaluate(at_end)
