"""The engine in a process of its own: messages, supervision, and `AsyncEngine`. Knows no HTTP."""
