"""Converts GGUF files (llama.cpp's format) into Hugging Face checkpoint directories."""
