"""The decoder block, and the modules that it consists of."""
