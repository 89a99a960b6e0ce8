"""Training: the loop, the engine under it, and checkpoints."""
