"""A program: starts an engine from an artifact, and keeps the bytecode of what the start imports.

    python -m compiledllm.engine.recorded_start OPTIONS

OPTIONS: those of `Engine` as JSON, with `artifact_dir`, where the bytecode is kept beside the
artifact. A start of its own is needed because the process that made the artifact has imported the
compiler, too, and no tokenizer. If the checkpoint has no tokenizer, the file has the engine's
modules only.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from compiledllm import bytecode_file
from compiledllm.config import ConfigError, EngineConfig
from compiledllm.engine import tokenizer_snapshot
from compiledllm.engine.engine import Engine
from compiledllm.engine.tokenizer import load
from compiledllm.sampling_params import SamplingParams


def main(options: Mapping[str, Any]) -> Path:
    """Start, complete a prompt, and write. Returns the file. Raises ConfigError, or OSError."""
    engine = Engine(**{**options, "skip_tokenizer_init": True})
    if not engine.core.worker.is_restored:
        raise ConfigError("the start compiled again instead of using the artifact")
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    engine.generate([{"prompt_token_ids": [0]}], params, use_tqdm=False)
    names = set(sys.modules)
    with suppress(ConfigError):  # there are checkpoints without a tokenizer
        tokenizer_snapshot.warm_up(options["artifact_dir"])
        load(EngineConfig.from_options(**options), engine.model_path)
        names = set(sys.modules)
    return bytecode_file.write(Path(options["artifact_dir"]), names)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
