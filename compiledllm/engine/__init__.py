"""The engine: from prompts to outputs, step by step."""
