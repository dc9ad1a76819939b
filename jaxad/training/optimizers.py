"""Optimizers as torch has them, where optax's differ, and one optimizer a group of parameters."""

from typing import Any

import jax.numpy as jnp
import optax


def of_parts(**optimizers: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimizer for each entry of the parameters, by name."""
    transforms: Any = optimizers
    return optax.partition(transforms, {name: name for name in optimizers})


def torch_sgd(learning_rate: float, momentum: float, weight_decay: float) -> optax.GradientTransformation:
    """SGD with weight decay added to the gradient, as `torch.optim.SGD` does."""
    return optax.chain(optax.add_decayed_weights(weight_decay), optax.sgd(learning_rate, momentum))


def torch_adam(
    learning_rate: optax.ScalarOrSchedule, weight_decay: float = 0.0, **options: Any
) -> optax.GradientTransformation:
    """Adam with weight decay added to the gradient, as `torch.optim.Adam` does; optax's `adamw` decouples it."""
    adam = optax.adam(learning_rate, **options)
    return optax.chain(optax.add_decayed_weights(weight_decay), adam) if weight_decay else adam


def torch_amsgrad_w(learning_rate: float, weight_decay: float, b2: float = 0.999) -> optax.GradientTransformation:
    """AdamW with AMSGrad, as `torch.optim.AdamW` does it: the largest second moment is taken before its correction.

    Source: Reddi et al., On the convergence of Adam and beyond, ICLR 2018.
    """

    def correction(step: Any) -> Any:
        return jnp.sqrt(1 - b2 ** (step + 1.0))

    return optax.chain(
        optax.scale_by_amsgrad(b2=b2, bias_correction_nu=False),
        optax.scale_by_schedule(correction),
        optax.add_decayed_weights(weight_decay),
        optax.scale(-learning_rate),
    )
