"""Trainable quantizers of weights and activations: thin modules over :mod:`bitstep.numerics`."""
