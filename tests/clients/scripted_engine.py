"""An engine's process whose model replays fixed answers, with a real tokenizer and no weights.

The model's folder has a `script.json`: a list of steps. The index of a request's step is the number
of tool results in its prompt.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from compiledllm.config import EngineConfig
from compiledllm.engine.served_model import ServedModel
from compiledllm.remote.engine_process import run
from compiledllm.types import Request, RequestStatus, RequestUpdate, StepNews
from tests.server.fake_engine import FakeCore

SCRIPT = "script.json"
STEP_S = 0.002
RESULT = "<|im_start|>tool\n"  # how `TEMPLATE` begins a tool's result
TEMPLATE = """{% if tools %}<|im_start|>system
# Tools {{ tools | tojson }}<|im_end|>
{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content or '' }}{% for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}{# </think> #}"""


def call(name: str, **arguments: Any) -> str:
    """The text by which a model calls a tool."""
    text = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{text}\n</tool_call>"


def step(says: str, *expects: str) -> dict[str, Any]:
    """expects: texts that the prompt must have; without one of them the answer says so."""
    return {"says": says, "expects": expects}


class ScriptedCore(FakeCore):
    max_model_len = 131_072

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.model_path = Path(str(config.model.model))
        self._tokenizer = Tokenizer.from_file(str(self.model_path / "tokenizer.json"))
        self._eos = self._tokenizer.token_to_id("<|im_end|>")
        self._answers: dict[str, list[int]] = {}  # of running requests, up to the end token
        self._steps = json.loads((self.model_path / SCRIPT).read_text())

    def served_model(self) -> ServedModel:
        size, longest = self._tokenizer.get_vocab_size(), self.max_model_len
        config = self.config.requested
        return ServedModel(config, longest, self.model_path, size, (self._eos,), longest)

    def step(self) -> StepNews:
        running, waiting = self.scheduler.running, self.scheduler.waiting
        while waiting:
            running.append(request := waiting.pop(0))
            self._answers[request.request_id] = [*self._answer(request), self._eos]
            self.on_start([request.request_id])
        time.sleep(STEP_S)
        updates = []
        for request in running:
            token = self._answers[request.request_id][request.num_output_tokens]
            request.token_ids.append(token)
            if token == self._eos:
                request.status, request.finish_reason = RequestStatus.FINISHED, "stop"
            elif request.num_output_tokens >= request.spec.max_tokens:
                request.status, request.finish_reason = RequestStatus.FINISHED, "length"
            updates.append(RequestUpdate.of(request, [token]))
        for request in [request for request in running if request.is_finished]:
            running.remove(request)
            del self._answers[request.request_id]
        return StepNews(updates=updates)

    def finish(self, request_id: str, reason: str, stop_reason: Any = None) -> None:
        super().finish(request_id, reason, stop_reason)
        self._answers.pop(request_id, None)

    def _answer(self, request: Request) -> list[int]:
        ids = request.spec.prompt_token_ids
        prompt = self._tokenizer.decode(ids, skip_special_tokens=False)
        found = self._steps[min(prompt.count(RESULT), len(self._steps) - 1)]
        missing = [text for text in found["expects"] if text not in prompt]
        says = f"The prompt lacks {missing}." if missing else found["says"]
        return self._tokenizer.encode(says, add_special_tokens=False).ids


if __name__ == "__main__":
    run(ScriptedCore)  # type: ignore[arg-type]
    sys.exit()
