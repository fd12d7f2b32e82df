"""A request's text as its tokens arrive: streaming decode, stop strings, text that is final."""

from __future__ import annotations

from bisect import bisect_right

from compiledllm.engine.token_stream import TokenStream
from compiledllm.sampling_params import SamplingParams


class Detokenizer:
    """Accumulates text and finds stop strings, also across token boundaries.

    Text that may turn out to be the beginning of a stop string is held back while the request runs.
    starts: where the text of each token begins, in characters; None without log probabilities.
    """

    def __init__(self, stream: TokenStream | None, params: SamplingParams) -> None:
        self._stream = stream
        self._stops = params.stop_strings
        self._keep_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._num_tokens = 0
        self._checked = 0  # stop strings that end before this index are ignored
        self.text = ""
        self.starts: list[int] | None = [] if params.wants_logprobs else None

    def push(self, token_id: int, hidden: bool = False) -> str | None:
        """Add one token; a hidden one (a stop token) adds no text. Returns a stop string hit."""
        self._num_tokens += 1
        if self.starts is not None:
            self.starts.append(len(self.text))
        if self._stream is None or hidden:
            return None
        text, self.text = self.text, ""  # a single reference lets CPython append in place
        text += self._stream.push(token_id)
        self.text = text
        if not self._stops:
            return None
        if self._num_tokens < self._min_tokens:
            self._checked = len(self.text)
            return None
        return self._find_stop()

    def visible_text(self, finished: bool) -> str:
        """The text that is final. finished: no token follows."""
        if finished and self._stream is not None:
            self.text += self._stream.finish()
            self._stream = None
        if finished or not self._stops:
            return self.text
        return self.text[: len(self.text) - self._held_back()]

    def num_visible_tokens(self, length: int) -> int:
        """Number of leading tokens whose text lies within the text's first `length` characters."""
        assert self.starts is not None
        if length >= len(self.text):
            return len(self.starts)
        return max(bisect_right(self.starts, length) - 1, 0)

    def _find_stop(self) -> str | None:
        starts = [max(0, self._checked - len(stop) + 1) for stop in self._stops]
        found = zip(map(self.text.find, self._stops, starts), self._stops, strict=True)
        hits = [(index, stop) for index, stop in found if index >= 0]
        if not hits:
            self._checked = len(self.text)
            return None
        index, stop = min(hits)
        self._stream = None  # no text after the stop string is shown
        self.text = self.text[: index + len(stop) if self._keep_stop else index]
        return stop

    def _held_back(self) -> int:
        """Length of the longest suffix of the text that begins a stop string."""
        return max((_overlap(self.text, stop) for stop in self._stops), default=0)


def _overlap(text: str, stop: str) -> int:
    max_length = min(len(stop) - 1, len(text))
    return next((n for n in range(max_length, 0, -1) if text.endswith(stop[:n])), 0)
