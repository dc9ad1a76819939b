"""Gradient ascent on features, and the shell around their centers."""

import jax.numpy as jnp
import numpy as np

from jaxad.synthesis.ascent import ascend, project_to_shell

RNG = np.random.default_rng(0)


def test_features_move_into_the_shell_along_the_line_to_their_centers():
    center = RNG.normal(size=(4, 5))
    x = center + RNG.normal(size=(60, 4, 5)) * RNG.uniform(0.1, 3, (60, 1, 1))
    moved = np.asarray(
        project_to_shell(jnp.asarray(x, jnp.float32), jnp.asarray(center, jnp.float32), jnp.float32(1.5))
    )
    old_distance, new_distance = (np.linalg.norm(y - center, axis=-1) for y in (x, moved))
    np.testing.assert_allclose(new_distance, np.clip(old_distance, 1.5, 3), rtol=1e-4)
    cosine = ((x - center) * (moved - center)).sum(-1) / old_distance / new_distance
    np.testing.assert_allclose(cosine, 1, rtol=1e-4)


def test_ascent_takes_steps_of_equal_length():
    goal = jnp.asarray(RNG.normal(size=(1, 1, 2, 3)), jnp.float32)
    loss = lambda x, count: (-jnp.sum((x - goal) ** 2), count + 1)  # noqa: E731
    start = jnp.asarray(RNG.normal(size=(1, 1, 2, 3)) + 5, jnp.float32)
    moved, count = ascend(loss, start, 0, 4, 0.1, 10, lambda x: x)
    np.testing.assert_allclose(np.linalg.norm(moved - start, axis=-1), 0.4, rtol=1e-3)
    assert loss(moved, 0)[0] > loss(start, 0)[0] and count == 4
    projected, _ = ascend(loss, start, 0, 4, 0.1, 2, lambda x: x * 0)
    np.testing.assert_array_equal(projected, jnp.zeros_like(start))
