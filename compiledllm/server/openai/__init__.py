"""OpenAI's API apart from HTTP: bodies in, engine requests, answers out, whole or as events."""
