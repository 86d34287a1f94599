"""What accompanies an objective, of more than one method."""
