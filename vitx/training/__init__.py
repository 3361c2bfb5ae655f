"""Training: configuration, optimizers, state and step, the loop, checkpoints, run folders."""
