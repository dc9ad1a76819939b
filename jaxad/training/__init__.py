"""What trained methods share: gradient stages, optimizers, hold-outs, and checks of hyperparameters."""

from jaxad.training.gradient import Descent, Training, constant, cosine, gradient_stage, shuffled_parts
from jaxad.training.statistics import statistics_stage

__all__ = ["Descent", "Training", "constant", "cosine", "gradient_stage", "shuffled_parts", "statistics_stage"]
