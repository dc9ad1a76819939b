"""Shapes of the parameters of a backbone."""

import jax

from jaxad.backbones import Backbone, backbone


def shapes_of(network: str | Backbone) -> dict[str, dict[str, tuple[int, ...]]]:
    """The shapes by module, as of a convolution's `kernel` (HWIO) and `bias`."""
    params = jax.eval_shape(backbone(network).init, jax.random.key(0))["params"]
    return jax.tree.map(lambda leaf: leaf.shape, params)
