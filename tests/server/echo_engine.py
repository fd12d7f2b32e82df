"""An engine's process whose model answers with the last message of its prompt, word for word."""

from __future__ import annotations

import re
import sys

from compiledllm.remote.engine_process import run
from compiledllm.types import Request
from tests.clients.scripted_engine import ScriptedCore

_MESSAGE = re.compile(r"<\|im_start\|>(?:user|tool)\n(.*?)<\|im_end\|>", re.DOTALL)


class EchoCore(ScriptedCore):
    def _answer(self, request: Request) -> list[int]:
        ids = request.spec.prompt_token_ids
        prompt = self._tokenizer.decode(ids, skip_special_tokens=False)
        said = _MESSAGE.findall(prompt)[-1]
        return self._tokenizer.encode(said, add_special_tokens=False).ids


if __name__ == "__main__":
    run(EchoCore)  # type: ignore[arg-type]
    sys.exit()
