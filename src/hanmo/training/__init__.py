"""Training: one trainer, its objectives, optimizers and checkpoints."""
