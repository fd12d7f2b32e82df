"""Grammars of structured outputs: compiled in a helper process first, then used to mask tokens."""
