"""Dense descriptions equal those of the patches one by one (Uninformed Students)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.backbones.patchnet import LAYERS, PatchNetwork, patch_size
from jaxad.nn.initial import torch_uniform
from tests.cases import TINY
from tests.methods.narrow import narrow_conv

SIZE = (24, 17)


@pytest.mark.parametrize("architecture", sorted(set(LAYERS).difference(TINY)))
@pytest.mark.parametrize("stride", [1, 2, 4, 8])
def test_dense_equals_patch_wise(architecture, stride):
    layer, p = f"stride{stride}", patch_size(architecture)
    conv = narrow_conv(torch_uniform)
    dense, alone = PatchNetwork(architecture, conv), PatchNetwork(architecture, conv, alone=True)
    image = jnp.asarray(np.random.default_rng(0).normal(size=(1, *SIZE, 3)), jnp.float32)
    variables = dense.init(jax.random.key(0), image, (layer,))
    found = jax.jit(dense.apply, static_argnums=2)(variables, image, (layer,))[layer]
    before, behind = ((p - 1) // 2 + shift for shift in (-(stride // 2), stride // 2))
    padded = np.pad(image, ((0, 0), (before, behind), (before, behind), (0, 0)))
    rows, columns = (range(0, n, stride) for n in SIZE)
    patches = np.concatenate([padded[:, i : i + p, j : j + p] for i in rows for j in columns])
    one_by_one = jax.jit(alone.apply, static_argnums=2)(variables, patches, ("stride1",))["stride1"]
    assert one_by_one.shape[1:3] == (1, 1)
    np.testing.assert_allclose(found.reshape(one_by_one.shape), one_by_one, atol=1e-5)
