"""Steps of gradient descent, as the `update` of a stage takes them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from jaxad.base import Metrics, PyTree


class Trained(NamedTuple):
    """Parameters with the state of their optimizer."""

    params: PyTree
    optimizer: Any


def begin(optimizer: optax.GradientTransformation, params: PyTree) -> Trained:
    """Parameters before the first step."""
    return Trained(params, optimizer.init(params))


def descend(
    optimizer: optax.GradientTransformation,
    trained: Trained,
    loss: Callable[[PyTree], Float[Array, ""]],
    rate: Float[Array, ""] | float = 1.0,
) -> tuple[Trained, Metrics]:
    """One step down the gradient of a loss, `rate` times as long as the optimizer's, and the loss before it."""
    trained, metrics, _ = descend_with(optimizer, trained, lambda params: (loss(params), None), rate)
    return trained, metrics


def descend_with(
    optimizer: optax.GradientTransformation,
    trained: Trained,
    loss: Callable[[PyTree], tuple[Float[Array, ""], Any]],
    rate: Float[Array, ""] | float = 1.0,
) -> tuple[Trained, Metrics, Any]:
    """`descend` for a loss that comes with something else, which is returned (the statistics of batch norms)."""
    (value, rest), gradient = jax.value_and_grad(loss, has_aux=True)(trained.params)
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies integers with floats
        updates, state = optimizer.update(gradient, trained.optimizer, trained.params)
    updates = jax.tree.map(lambda leaf: rate * leaf, updates)
    return Trained(optax.apply_updates(trained.params, updates), state), {"loss": value}, rest


def of_parts(**optimizers: optax.GradientTransformation) -> optax.GradientTransformation:
    """An optimizer for each entry of the parameters, by name."""
    transforms: Any = optimizers
    return optax.partition(transforms, {name: name for name in optimizers})


def torch_adam(
    learning_rate: optax.ScalarOrSchedule, weight_decay: float = 0.0, **options: Any
) -> optax.GradientTransformation:
    """Adam with weight decay added to the gradient, as `torch.optim.Adam` does; optax's `adamw` decouples it."""
    adam = optax.adam(learning_rate, **options)
    return optax.chain(optax.add_decayed_weights(weight_decay), adam) if weight_decay else adam


def torch_amsgrad_w(learning_rate: float, weight_decay: float, b2: float = 0.999) -> optax.GradientTransformation:
    """AdamW with AMSGrad, as `torch.optim.AdamW` does it: the largest second moment is sought before its correction.

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


def zero_padding(x: PyTree, valid: Bool[Array, "b"]) -> PyTree:
    """Arrays of a batch with zeros in place of whatever padding holds (0 * nan is nan)."""
    return jax.tree.map(
        lambda leaf: jnp.where(valid.reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, jnp.zeros_like(leaf)), x
    )


def mean_of_valid(x: Float[Array, "b"], valid: Bool[Array, "b"]) -> Float[Array, ""]:
    """The mean over what is no padding; 0 where all is."""
    return jnp.where(valid, x, 0).sum() / jnp.maximum(valid.sum(), 1).astype(x.dtype)
