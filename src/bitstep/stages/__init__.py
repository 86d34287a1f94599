"""The verbs: load, calibrate, fine-tune, pack, sample, evaluate, each a function of its own file."""
