"""Few-bit diffusion models: quantize, pack, sample."""
