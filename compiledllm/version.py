"""The version of this package, from which packaging, CLI and server read it, and of others."""

__version__ = "0.1.0"


def version_of(package: str) -> str:
    """The version of an installed package; "" if it is not installed."""
    from importlib import metadata  # takes 20 ms

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
