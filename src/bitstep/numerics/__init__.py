"""Pure functions on tensors: the mathematics of quantization, with no module and no state."""
