"""Compilation of decoder blocks, CUDA graphs of whole steps, and the step sizes to capture."""

if __name__ != "compiledllm.graphs":
    raise ImportError(
        f"this folder is installed as compiledllm.graphs; importing it as '{__name__}' would "
        "make a second copy. Use 'import compiledllm.graphs' (after 'pip install -e .')."
    )
