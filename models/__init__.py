"""Model architectures: specs, the one decoder, families, weight loading."""

if __name__ != "compiledllm.models":
    raise ImportError(
        f"this folder is installed as compiledllm.models; importing it as '{__name__}' would "
        "make a second copy. Use 'import compiledllm.models' (after 'pip install -e .')."
    )
