"""Clients too heavy for the test suite, against a server whose model replays fixed answers."""
