"""What trained methods share: gradient stages, optimizers, hold-outs, and checks of hyperparameters."""
