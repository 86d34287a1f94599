"""What training minimises: the error of the output on trajectories, or of one block after another; a loss on images."""
