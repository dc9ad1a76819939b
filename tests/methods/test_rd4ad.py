"""RD4AD: the parameters of the official networks, and which image sizes it takes."""

import jax
import jax.numpy as jnp
import pytest

from jaxad.methods.rd4ad import Reverse, rd4ad

KEY = jax.random.key(0)


def test_image_sizes_that_do_not_halve_are_refused():
    with pytest.raises(ValueError, match=r"multiples of 32, got \(60, 64\)"):
        rd4ad(backbone="resnet18", image_size=(60, 64))


@pytest.mark.parametrize(("blocks", "width"), [((2, 2, 2, 2), 1.0), ((3, 3, 4, 6), 0.5)])
def test_networks_have_the_official_parameters(blocks, width):
    """Kernels (size, input and output channels) of the bottleneck and decoder as in resnet.py and de_resnet.py."""
    c1, c2, c3 = 8, 16, 32
    module = Reverse((c1, c2, c3), blocks, width)
    shapes = {"layer1": (8, 16, c1), "layer2": (4, 8, c2), "layer3": (2, 4, c3)}
    x = {layer: jnp.zeros((1, *shape)) for layer, shape in shapes.items()}
    maps, variables = jax.eval_shape(lambda: module.init_with_output(KEY, x, train=True))
    assert {layer: leaf.shape[1:] for layer, leaf in maps.items()} == shapes

    def block(inputs: int, outputs: int, scale: str) -> list[tuple[int, ...]]:
        inner = int(outputs * width)
        resize = 2 if scale == "up" else None
        if width == 1:
            kernels = [(resize or 3, inputs, outputs), (3, outputs, outputs)]
        else:
            kernels = [(1, inputs, inner), (resize or 3, inner, inner), (1, inner, outputs)]
        return kernels if scale == "same" else [*kernels, (resize or 1, inputs, outputs)]

    expected = [(3, c1, c2), (3, c2, c3), (3, c2, c3)]
    inputs = 3 * c3
    for n, outputs, scale in zip(blocks, (2 * c3, c3, c2, c1), ("down", "up", "up", "up"), strict=True):
        for i in range(n):
            expected += block(inputs, outputs, "same" if i else scale)
            inputs = outputs
    kernels = [leaf.shape for leaf in jax.tree.leaves(variables["params"]) if len(leaf.shape) == 4]
    assert sorted((k[0], k[2], k[3]) for k in kernels) == sorted(expected)
