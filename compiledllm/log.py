"""The package's logger: plain lines on stderr, unless the host application configured logging."""

from __future__ import annotations

import logging

log = logging.getLogger("compiledllm")

MAX_LINE = 4096  # characters


class OneLine(logging.Filter):
    """Keeps each record on one line, so that a client's text cannot forge log lines or colours.

    Control characters are escaped, and the lines of a traceback are indented.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = escaped(record.getMessage())[:MAX_LINE], None
        if record.exc_info and not record.exc_text:
            lines = logging.Formatter().formatException(record.exc_info).split("\n")
            record.exc_text = "\n".join(f"  {escaped(line)[:MAX_LINE]}" for line in lines)
        return True


def escaped(text: str) -> str:
    """The text with unprintable characters as backslash escapes; tabs stay."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\t" else repr(c)[1:-1] for c in text)


log.addFilter(OneLine())


def show_logs(level: int = logging.INFO) -> None:
    """Send the package's log lines to stderr, unless a logging handler is already installed."""
    if not log.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s %(message)s", "%H:%M:%S"))
        log.addHandler(handler)
        log.propagate = False
    if log.level == logging.NOTSET:
        log.setLevel(level)
