"""A dense map of descriptions equals those of its patches, one by one (Uninformed Students)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.backbones.patchnet import LAYOUTS, PatchNetwork
from jaxad.nn.initial import torch_uniform
from tests.examples import slow_after
from tests.methods.narrow import narrow_conv

SIZE = (24, 17)


@pytest.mark.parametrize("architecture", LAYOUTS)
@pytest.mark.parametrize("stride", slow_after(1, [4, 1, 2, 8]))
def test_dense_equals_patch_wise(architecture, stride):
    layer, layout, conv = f"stride{stride}", LAYOUTS[architecture], narrow_conv(torch_uniform)
    p = layout.patch_size
    dense, patch_wise = PatchNetwork(layout, conv), PatchNetwork(layout, conv, single_patch=True)
    image = jnp.asarray(np.random.default_rng(0).normal(size=(1, *SIZE, 3)), jnp.float32)
    variables = jax.jit(dense.init, static_argnums=2)(jax.random.key(0), image, (layer,))
    maps = jax.jit(dense.apply, static_argnums=2)(variables, image, (layer,))[layer]
    before, after = ((p - 1) // 2 + shift for shift in (-(stride // 2), stride // 2))
    padded = np.pad(image, ((0, 0), (before, after), (before, after), (0, 0)))
    rows, columns = (range(0, n, stride) for n in SIZE)
    patches = np.concatenate([padded[:, i : i + p, j : j + p] for i in rows for j in columns])
    one_by_one = jax.jit(patch_wise.apply, static_argnums=2)(variables, patches, ("stride1",))["stride1"]
    assert one_by_one.shape[1:3] == (1, 1)
    np.testing.assert_allclose(maps.reshape(one_by_one.shape), one_by_one, atol=1e-5)
