"""Initializers of torch's layers."""

import jax

torch_uniform = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""The weights of torch's linear layers and convolutions."""


def torch_bias(fan_in: int) -> jax.nn.initializers.Initializer:
    """The biases of torch's linear layers and convolutions: uniform within ±1 / sqrt(fan_in)."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=None, out_sharding=None: jax.random.uniform(key, shape, dtype, -bound, bound)
