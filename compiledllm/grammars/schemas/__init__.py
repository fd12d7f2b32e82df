"""JSON schemas in the keywords and patterns that llguidance has. Knows no tokens."""
