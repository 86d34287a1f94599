"""Running packed models: packed layers, the kernels that compute them, and the choice among kernels."""
