"""What is compiled, captured and replayed: decoder blocks, whole steps, and their sizes."""

if __name__ != "compiledllm.graphs":
    raise ImportError(
        f"this folder is installed as compiledllm.graphs; importing it as '{__name__}' would "
        "make a second copy. Use 'import compiledllm.graphs' (after 'pip install -e .')."
    )
