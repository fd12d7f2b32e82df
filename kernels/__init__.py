"""Tensor ops and their kernels. No other package imports triton or flashinfer."""

if __name__ != "compiledllm.kernels":
    # With the repository root on sys.path (python -m ..., python -c ...) this folder looks like
    # Hugging Face's `kernels` package, which transformers imports to read its version. Under the
    # name `kernels` the folder is therefore importable but empty, so that no module can be imported
    # twice.
    __path__ = []

    def __getattr__(name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ImportError(
            "this folder is installed as compiledllm.kernels; importing it as 'kernels' would "
            "make a second copy. Use 'import compiledllm.kernels' (after 'pip install -e .')."
        )
