"""Pure functions from a checkpoint's quantised tensors to `QuantizedMatrix`, a file per format."""
