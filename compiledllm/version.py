"""The version, in the one place that packaging, the CLI and the server read."""

__version__ = "0.1.0"
