"""GGUF files (llama.cpp's format), turned into ordinary checkpoint directories."""
