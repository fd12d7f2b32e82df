"""Options in a file, and where a server may listen."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compiledllm import cli
from compiledllm.config import ConfigError

Parse = Callable[..., Any]


@pytest.fixture
def parse(tmp_path: Path) -> Parse:
    """parse(text of the file, *words) -> the arguments of `serve`."""

    def run(text: str, *words: str) -> argparse.Namespace:
        path = tmp_path / "options.yaml"
        path.write_text(text)
        found: argparse.Namespace = cli._parser().parse_args(["serve", f"--config={path}", *words])
        return found

    return run


# -- files ----------------------------------------------------------------------------------------


def test_a_file_holds_options_of_all_kinds(parse: Parse) -> None:
    found = parse(
        "model: org/m\nport: 9\nserved-model-name: [a, b]\napi_key: [k]\nmax-model-len: 8k\n"
        "enforce-eager: true\nenable_prefix_caching: false\nstrict-fields: true\nseed: null\n"
        "default-chat-template-kwargs: {enable_thinking: false}\ntensor-parallel-size: 1\n"
        "request-timeout: 2.5\n"
    )
    assert (found.model, found.port, found.served_model_name) == ("org/m", 9, ["a", "b"])
    assert (found.api_key, found.max_model_len, found.request_timeout) == (["k"], 8000, 2.5)
    assert found.enforce_eager and found.strict_fields and not found.enable_prefix_caching
    assert found.default_chat_template_kwargs == {"enable_thinking": False}
    assert "seed" not in found and found.model_name is None


def test_the_command_line_wins_wherever_it_stands(parse: Parse) -> None:
    text = "model: in-file\nport: 9\nserved-model-name: [a]\nenforce-eager: true"
    found = parse(text, "m", "--port", "10", "--no-enforce-eager")
    assert (found.model_name, found.port, found.served_model_name) == ("m", 10, ["a"])
    assert not found.enforce_eager


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot: 9", "unknown option 'prot'; did you mean --port?"),
        ("config: other.yaml", "unknown option 'config'"),
        ("port: nine", "argument --port: must be an integer from 0 to 65535, got 'nine'"),
        ("enforce-eager: maybe", "enforce-eager must be true or false, got 'maybe'"),
        ("- port", "must be options with values, such as 'port: 8000', one a line"),
        ("a: [", "cannot be read (while parsing"),
        ("enable-lora: true", "enable_lora=True is vLLM's option, not supported here"),
        ("dtype: fp8", "argument --dtype: must be one of auto"),
    ],
)
def test_a_wrong_file_is_named(
    text: str, message: str, parse: Parse, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(text)
    shown = capsys.readouterr().err
    assert f"options.yaml: {message}" in shown and len(shown) < 500


def test_a_file_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["serve", "--config", "/none.yaml"])
    assert "/none.yaml: cannot be read ([Errno 2] No such file" in capsys.readouterr().err


def test_keys_of_json_options_may_be_given_one_by_one() -> None:
    words = "--default-chat-template-kwargs.enable_thinking false m --port=9"
    words += " --default-chat-template-kwargs.a.b=[1] --compilation-config.mode 3"
    found = arguments(*words.split())
    assert found.default_chat_template_kwargs == {"enable_thinking": False, "a": {"b": [1]}}
    assert (found.model_name, found.port) == ("m", 9)


def test_a_key_of_an_option_that_does_not_exist_is_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        arguments("--defalt-chat-template-kwargs.x", "1")
    assert "unknown option --defalt-chat-template-kwargs.x" in capsys.readouterr().err


# -- listening ------------------------------------------------------------------------------------


def arguments(*words: str) -> argparse.Namespace:
    found: argparse.Namespace = cli._parser().parse_args(["serve", *words])
    return found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--ssl-keyfile", "k.pem"], "--ssl-keyfile needs --ssl-certfile"),
        (["--ssl-certfile", "/none.pem"], "TLS cannot be set up (No such file or directory) with "
         "ssl_certfile=/none.pem; give PEM files"),
        (["--ssl-certfile", __file__], "TLS cannot be set up ("),
        (["--ssl-certfile", "c", "--ssl-cert-reqs", "2"], "--ssl-cert-reqs needs --ssl-ca-certs"),
    ],
)  # fmt: skip
def test_wrong_tls_files_are_named_before_anything_is_loaded(
    words: list[str], message: str
) -> None:
    pytest.importorskip("fastapi")
    from compiledllm.server.listening import tls_options

    with pytest.raises(ConfigError) as refused:
        tls_options(arguments(*words))
    assert message in str(refused.value)
    assert tls_options(arguments()) == {}


def test_a_unix_socket_replaces_a_dead_one_and_no_living_one(tmp_path: Path) -> None:
    pytest.importorskip("fastapi")
    from compiledllm.server.listening import close, is_local, listen, way_to_try

    path = str(tmp_path / "socket")
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(path)
    dead.close()
    listener = listen(arguments("--uds", path))
    assert is_local(listener) and f"--unix-socket {path}" in way_to_try(listener, False, "")
    with pytest.raises(ConfigError, match="cannot listen on .*; choose another --uds"):
        listen(arguments("--uds", path))
    close(listener, path)
    assert not Path(path).exists()
    (tmp_path / "file").write_text("keep me")
    with pytest.raises(ConfigError, match="choose another --uds"):
        listen(arguments("--uds", str(tmp_path / "file")))
    assert (tmp_path / "file").read_text() == "keep me"


def test_the_address_that_is_shown_can_be_asked() -> None:
    pytest.importorskip("fastapi")
    from compiledllm.server.listening import close, listen, way_to_try

    listener = listen(arguments("--port", "0"))
    port = listener.getsockname()[1]
    assert way_to_try(listener, True, "/llm").startswith(f"https://127.0.0.1:{port}/llm  (try:")
    with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port} .*another --port"):
        listen(arguments("--port", str(port)))
    close(listener, None)


@pytest.mark.parametrize("text", ["llm", "/a//b", "/ä"])
def test_a_root_path_is_a_path(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert [arguments("--root-path", path).root_path for path in ("", "/", "/llm/")] == [
        *("", "", "/llm"),
    ]
    with pytest.raises(SystemExit):
        arguments("--root-path", text)
    assert f"must be a path such as /llm, got '{text}'" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["65536", "-1", "x", "8e3"])
def test_a_port_is_one(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert [arguments("--port", port).port for port in ("0", "65535")] == [0, 65535]
    with pytest.raises(SystemExit):
        arguments("--port", text)
    assert f"must be an integer from 0 to 65535, got '{text}'" in capsys.readouterr().err


def test_origins_may_be_words_or_vllms_json() -> None:
    assert arguments("--allowed-origins", "a", "b").allowed_origins == ["a", "b"]
    assert arguments("--allowed-origins", '["*"]').allowed_origins == ["*"]


def test_the_examples_of_deployment_are_command_lines_of_ours() -> None:
    folder = Path(cli.__file__).parent / "server" / "examples"
    unit = (folder / "compiledllm.service").read_text()
    (start,) = re.findall(r"^ExecStart=\S+/compiledllm (.*)$", unit, re.M)
    assert cli._parser().parse_args(start.replace("/etc/compiledllm.yaml", "/dev/null").split())
    image = (folder / "Dockerfile").read_text()
    words = [
        w
        for line in re.findall(r"^(?:ENTRYPOINT|CMD) (.*)$", image, re.M)
        for w in json.loads(line)
    ]
    assert words[0] == "compiledllm" and cli._parser().parse_args(words[1:]).host == "0.0.0.0"


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd is not installed")
    unit = Path(cli.__file__).parent / "server" / "examples" / "compiledllm.service"
    text = unit.read_text().replace("/opt/compiledllm/bin/compiledllm", "/bin/sh")  # must exist
    (tmp_path / unit.name).write_text(text)
    command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / unit.name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.count(unit.name)) == (0, 0), done.stderr


# -- the order of words ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "model", "prompt"),
    [
        (["m", "--max-tokens", "5", "hi"], "m", "hi"),
        (["--max-tokens", "5", "m", "-q", "hi"], "m", "hi"),
        (["m", "hi", "--max-tokens=5"], "m", "hi"),
        (["m", "-q", "hi", "--max-tokens", "5", "--no-enforce-eager"], "m", "hi"),
        (["--max-tokens", "5", "hi"], None, "hi"),
        (["hi", "--bad-words", "a", "b", "--max-tokens", "5"], None, "hi"),
        (["--max-tokens", "5", "--bad-words", "a", "b", "--", "m", "hi"], "m", "hi"),
        (["m", "--max-tokens", "5", "-"], "m", "-"),
        (["m", "--max-tokens", "5", "-3"], "m", "-3"),
        (["m", "--max-tokens", "5", "- a list"], "m", "- a list"),
        (["m", "--max-tokens", "5", "--", "--hi"], "m", "--hi"),
        (["--compilation-config.mode", "3", "m", "--max-tokens", "5", "hi"], "m", "hi"),
    ],
    ids=str,
)
def test_options_may_stand_anywhere(words: list[str], model: str | None, prompt: str) -> None:
    found = cli._parser().parse_args(["generate", *words])
    assert (found.model_name, found.prompt, found.max_tokens) == (model, prompt, 5)


@pytest.mark.parametrize("command", ["chat", "serve", "run-batch"])
def test_the_model_may_stand_behind_options(command: str) -> None:
    found = cli._parser().parse_args([command, "--max-num-seqs", "5", "m", "--block-size", "32"])
    assert (found.model_name, found.max_num_seqs, found.block_size) == ("m", 5, 32)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["m", "--max-tokens", "5", "hi", "ho"], "one argument too many: 'ho'"),
        (["m", "--max-tokes", "5", "hi"], "unknown option --max-tokes; did you mean --max-tokens?"),
        (["--max-tokens", "5"], "the following arguments are required: prompt"),
        (["m", "hi", "--max-tokens"], "argument --max-tokens: expected one argument"),
    ],
    ids=str,
)
def test_what_is_wrong_with_the_words_is_said(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli._parser().parse_args(["generate", *words])
    assert message in capsys.readouterr().err


def test_words_behind_a_sub_command_are_its_own() -> None:
    found = cli._parser().parse_args(["bench", "latency", "--batch-size", "2"])
    assert found.batch_size in (2, [2])
