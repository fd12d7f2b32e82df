"""Forms of outputs as grammars: compiled in a helper process first, then followed by tokens."""
