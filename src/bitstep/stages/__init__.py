"""What the verbs are made of: from load, calibrate, fine-tune and pack to sample, evaluate and report."""
