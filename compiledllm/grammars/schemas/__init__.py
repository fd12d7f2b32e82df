"""Rewrites JSON schemas with keywords and patterns that llguidance supports. Knows no tokens."""
