"""Any diffusers denoiser, seen from outside: its calls and their timesteps, its layers, its attention, its output."""
