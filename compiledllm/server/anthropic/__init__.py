"""Anthropic's Messages API over the same jobs and engine as OpenAI's API."""
