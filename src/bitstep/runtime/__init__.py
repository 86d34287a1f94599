"""Packed layers and the kernels that run them; imports no training code."""
