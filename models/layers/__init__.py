"""The modules that a decoder block consists of."""
