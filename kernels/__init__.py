"""Ops on tensors and their kernels. The only place that imports triton or flashinfer."""

if __name__ != "compiledllm.kernels":
    # With the repository root on sys.path (python -m ..., python -c ...) this folder looks like
    # Hugging Face's `kernels` package, and transformers imports that to ask for its version. So
    # this copy stays importable, but empty: nothing in it can be imported a second time.
    __path__ = []

    def __getattr__(name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(
            "this folder is installed as compiledllm.kernels; importing it as 'kernels' would "
            "make a second copy. Use 'import compiledllm.kernels' (after 'pip install -e .')."
        )
