"""Benchmarks, one file each; results are committed under results/."""

if __name__ != "compiledllm.benchmarks":
    raise ImportError(
        f"this folder is installed as compiledllm.benchmarks; importing it as '{__name__}' would "
        "make a second copy. Use 'import compiledllm.benchmarks' (after 'pip install -e .')."
    )
