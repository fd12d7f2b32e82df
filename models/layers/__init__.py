"""Parts the decoder is built from."""
