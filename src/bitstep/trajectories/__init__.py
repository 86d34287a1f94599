"""What a quantized denoiser is fitted to: recorded calls of the full-precision one, and training images."""
