"""The version, in the one place that packaging, the CLI and the server read; those of packages."""

__version__ = "0.1.0"


def version_of(package: str) -> str:
    """The version of an installed package; "" if it is not installed."""
    from importlib import metadata  # takes 20 ms

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
