"""The engine: turns prompts into outputs, step by step."""
