"""Every bijector: its inverse, and its log-determinant against the Jacobian, on random shapes and parameters."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import distrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxad.bijectors import (
    ActNorm,
    CrossScaleCoupling,
    Invertible1x1,
    LuFactors,
    MultiScale,
    Permutation,
    Scan,
    Squeeze,
    act_norm_init,
    affine_block,
    block_params,
    checkerboard_mask,
    coupling,
    glow_coupling,
    half_coupling,
    half_mask,
    lu_matrix,
    masked_coupling,
    quadrant_mask,
    random_orthogonal,
    scan_init,
)
from tests.examples import slow_after

KEY = jax.random.key(0)


def weights(key: Any, rows: int, columns: int) -> Any:
    return jax.random.normal(key, (rows, columns)) / np.sqrt(rows)


def network(key: Any, inputs: int, transformed: int, pixels: bool = False) -> Any:
    """(params, apply): a conditioner, which depends on neighbors, too, if its events are images."""
    hidden = 7
    params = weights(key, inputs, hidden), weights(jax.random.fold_in(key, 1), hidden, 2 * transformed)

    def apply(params: Any, x: Any) -> Any:
        y = jnp.tanh(x @ params[0])
        y = y + jnp.roll(y, 1, -2) if pixels else y
        return y @ params[1]

    return params, apply


class Example(NamedTuple):
    params: Any
    flow: Callable[[Any], distrax.Bijector]
    shape: Any
    """Shape of an event, or of each of its images."""


def dense(key: Any, c: int, h: int, w: int, swap: bool = False, kind: str = "atan") -> Example:
    unchanged = c // 2 if swap else c - c // 2
    params, apply = network(key, unchanged, c - unchanged)
    options: dict[str, Any] = dict(clamp=1.5, kind=kind, event_ndims=1, swap=swap)
    return Example(params, lambda p: coupling(functools.partial(apply, p), c, **options), (c,))


def conditional(key: Any, c: int, h: int, w: int) -> Example:
    """Conditioned on an encoding of the position, which is not part of the event."""
    position = jax.random.normal(jax.random.fold_in(key, 9), (3,))
    params, apply = network(key, c - c // 2 + 3, c // 2)

    def flow(p: Any) -> distrax.Bijector:
        def conditioner(x: Any) -> Any:
            return apply(p, jnp.concatenate([x, jnp.broadcast_to(position, (*x.shape[:-1], 3))], -1))

        return coupling(conditioner, c, clamp=1.9, kind="tanh", event_ndims=1)

    return Example(params, flow, (c,))


def convolutional(key: Any, c: int, h: int, w: int) -> Example:
    first, apply = network(key, c - c // 2, c // 2, True)
    second, other = network(jax.random.fold_in(key, 2), c // 2, c - c // 2, True)

    def flow(p: Any) -> distrax.Bijector:
        conditioners = functools.partial(apply, p[0]), functools.partial(other, p[1])
        return glow_coupling(conditioners, c, clamp=3.0, kind="atan", event_ndims=3)

    return Example((first, second), flow, (h, w, c))


def masked(key: Any, c: int, h: int, w: int, mask: Any = checkerboard_mask, other: bool = False) -> Example:
    params, apply = network(key, c, c, True)
    m = jnp.asarray(mask(h, w, c, other))
    return Example(params, lambda p: masked_coupling(m, functools.partial(apply, p)), (h, w, c))


def halves(key: Any, c: int, h: int, w: int) -> Example:
    params, apply = network(key, c - c // 2, c // 2, True)
    return Example(params, lambda p: half_coupling(functools.partial(apply, p), c), (h, w, c))


def quadrants(key: Any, c: int, h: int, w: int) -> Example:
    """One quadrant is transformed, conditioned on another."""
    params, apply = network(key, c, c, True)
    unchanged, inputs = ~quadrant_mask(h, w, c, 1), quadrant_mask(h, w, c, 0)

    def flow(p: Any) -> distrax.Bijector:
        conditioner = lambda x: apply(p, jnp.where(inputs, x, 0))  # noqa: E731
        return masked_coupling(jnp.asarray(unchanged), conditioner)

    return Example(params, flow, (h, w, c))


def repeated_block(key: Any, c: int, h: int, w: int) -> Example:
    subnet, apply = network(key, c - c // 2, c // 2, True)
    params = block_params(subnet, c)._replace(shift=jax.random.normal(key, (c,)))
    order = Permutation(jax.random.permutation(key, c), 3)

    def flow(p: Any) -> distrax.Bijector:
        return affine_block(p, functools.partial(apply, p.subnet), order, clamp=1.9, event_ndims=3)

    return Example(params, flow, (h, w, c))


def cross_scale(key: Any, c: int, h: int, w: int) -> Example:
    shapes = (2 * h, 2 * w, c), (h, w, c)
    sizes = ((c - c // 2, c // 2), (c // 2, c - c // 2))
    params = tuple(network(jax.random.fold_in(key, i), 2 * a, b)[0] for i, (a, b) in enumerate(sizes))
    applies = tuple(network(key, 2 * a, b, True)[1] for a, b in sizes)

    def flow(p: Any) -> distrax.Bijector:
        def conditioner(params: Any, apply: Any, parts: Any) -> Any:
            fine, coarse = parts
            up = coarse.repeat(2, -3).repeat(2, -2)
            down = fine[..., ::2, ::2, :]
            return apply(params, jnp.concatenate([fine, up], -1)), apply(params, jnp.concatenate([down, coarse], -1))

        conditioners = tuple(functools.partial(conditioner, q, f) for q, f in zip(p, applies, strict=True))
        return CrossScaleCoupling(conditioners, c, clamp=3.0, kind="atan")

    return Example(params, flow, shapes)


def permutation(key: Any, c: int, h: int, w: int) -> Example:
    index = jax.random.permutation(key, c)
    return Example((), lambda p: Permutation(index, 3), (h, w, c))


def orthogonal(key: Any, c: int, h: int, w: int) -> Example:
    return Example(random_orthogonal(key, c), lambda p: Invertible1x1(p, 3, orthogonal=True), (h, w, c))


def invertible(key: Any, c: int, h: int, w: int) -> Example:
    matrix = random_orthogonal(key, c) + 0.2 * weights(key, c, c)
    return Example(matrix, lambda p: Invertible1x1(p, 1), (c,))


def by_lu(key: Any, c: int, h: int, w: int) -> Example:
    order = jax.random.permutation(key, c)
    params = LuFactors(0.3 * weights(key, c, c), jnp.linspace(-0.5, 0.5, c))

    def flow(p: LuFactors) -> distrax.Bijector:
        matrix, log_det = lu_matrix(p, order)
        return Invertible1x1(matrix, 3, log_det=log_det)

    return Example(params, flow, (h, w, c))


def act_norm(key: Any, c: int, h: int, w: int) -> Example:
    params = act_norm_init(jax.random.normal(key, (9, h, w, c)) * 3 + 1)
    return Example(params, lambda p: ActNorm(*p, 3), (h, w, c))


def squeeze(key: Any, c: int, h: int, w: int) -> Example:
    return Example((), lambda p: Squeeze(), (2 * h, 2 * w, c))


def glow_block(p: Any, c: int, apply: Any) -> distrax.Bijector:
    """ActNorm, 1x1 convolution, coupling."""
    norm, matrix, params = p
    affine = coupling(functools.partial(apply, params), c, clamp=1.0, kind="atan", event_ndims=3)
    return distrax.Chain([affine, Invertible1x1(matrix, 3), ActNorm(*norm, 3)])


def glow_init(key: Any, x: Any) -> Any:
    c = x.shape[-1]
    return act_norm_init(x), random_orthogonal(key, c), network(key, c - c // 2, c // 2, True)[0]


def chain_of_blocks(key: Any, c: int, h: int, w: int, remat: bool = False) -> Example:
    apply = network(key, c - c // 2, c // 2, True)[1]
    block = functools.partial(glow_block, c=c, apply=apply)
    images = jax.random.normal(key, (64, h, w, c))  # fewer would leave ActNorm some channels that hardly vary
    params, _ = scan_init(glow_init, block, key, 3, images)
    return Example(params, lambda p: Scan(block, p, 3, remat=remat), (h, w, c))


def multi_scale(key: Any, c: int, h: int, w: int) -> Example:
    """Squeeze and blocks, twice; half of the channels leave in between."""
    chains = [chain_of_blocks(jax.random.fold_in(key, i), n, h, w) for i, n in enumerate((4 * c, 8 * c))]

    def flow(p: Any) -> distrax.Bijector:
        levels = [distrax.Chain([chain.flow(q), Squeeze()]) for chain, q in zip(chains, p, strict=True)]
        return MultiScale(levels, (4 * h, 4 * w, c))

    return Example(tuple(chain.params for chain in chains), flow, (4 * h, 4 * w, c))


EXAMPLES = {
    "coupling": dense,
    "coupling, swapped, tanh": functools.partial(dense, swap=True, kind="tanh"),
    "coupling with a position": conditional,
    "convolutional coupling of both parts": convolutional,
    "checkerboard": masked,
    "checkerboard, odd": functools.partial(masked, other=True),
    "coupling of the first half": halves,
    "half mask, odd": functools.partial(masked, mask=half_mask, other=True),
    "quadrants": quadrants,
    "cross-scale coupling": cross_scale,
    "repeated block": repeated_block,
    "permutation": permutation,
    "orthogonal 1x1": orthogonal,
    "invertible 1x1": invertible,
    "invertible 1x1 by its LU factors": by_lu,
    "ActNorm": act_norm,
    "squeeze": squeeze,
    "scan of Glow blocks": chain_of_blocks,
    "scan, remat": functools.partial(chain_of_blocks, remat=True),
    "multi-scale": multi_scale,
}


VARIANTS = ("odd", "second", "swapped, tanh", "remat")
"""Names end so if another example takes the same path."""
every_bijector = pytest.mark.parametrize(
    "make",
    [
        pytest.param(make, id=name, marks=pytest.mark.slow if name.endswith(VARIANTS) else ())
        for name, make in EXAMPLES.items()
    ],
)
COMPOSED = ("convolutional coupling of both parts", "cross-scale coupling", "scan of Glow blocks")
every_kind = pytest.mark.parametrize(
    "make",
    slow_after(
        len(COMPOSED),
        [
            EXAMPLES[name]
            for name in sorted(EXAMPLES, key=lambda name: name not in COMPOSED)
            if not name.endswith(VARIANTS)
        ],
    ),
)


def events(key: Any, example: Example, *batch: int, scale: float = 1.0) -> Any:
    several = isinstance(example.shape[0], tuple)
    shapes = example.shape if several else (example.shape,)
    x = tuple(scale * jax.random.normal(jax.random.fold_in(key, i), (*batch, *shape)) for i, shape in enumerate(shapes))
    return x if several else x[0]


def flat(x: Any) -> Any:
    return jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(x)])


@functools.lru_cache(8)
def round_trip(make: Any, c: int, h: int, w: int) -> Any:
    def run(key: Any) -> Any:
        example = make(key, c, h, w)
        flow = example.flow(example.params)
        x = events(jax.random.fold_in(key, 1), example)
        jacobian = jax.jacfwd(lambda v: flat(flow.forward(v)))(x)
        y, log_det = flow.forward_and_log_det(x)
        return x, flow.inverse_and_log_det(y), log_det, jacobian

    return jax.jit(run)


@every_bijector
@pytest.mark.parametrize(("c", "h", "w"), slow_after(1, [(3, 2, 1), (2, 1, 1), (4, 1, 2), (5, 2, 2)]))
@settings(deadline=None, max_examples=4)
@given(seed=st.integers(0, 2**16))
def test_the_inverse_and_the_log_determinant(make, c, h, w, seed):
    x, (inverted, inverse_log_det), log_det, jacobian = round_trip(make, c, h, w)(jax.random.key(seed))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), inverted, x)
    assert log_det.shape == () and inverse_log_det.shape == ()
    matrix = np.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(jacobian)], 1)
    expected = np.linalg.slogdet(np.asarray(matrix, np.float64))[1]
    np.testing.assert_allclose([log_det, -inverse_log_det], expected, rtol=1e-3, atol=1e-3)


@every_kind
def test_jit_vmap_and_batches_agree(make):
    example = make(KEY, 4, 2, 2)
    x = events(KEY, example, 2, 3)
    run = lambda p, x: example.flow(p).forward_and_log_det(x)  # noqa: E731
    batched = jax.jit(run)(example.params, x)
    assert batched[1].shape == (2, 3)
    mapped = jax.jit(jax.vmap(jax.vmap(run, (None, 0)), (None, 0)))(example.params, x)
    for other in (mapped, *([run(example.params, x)] if make is dense else [])):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), other, batched)


@every_kind
def test_a_scan_of_two_equal_blocks_applies_the_block_twice(make):
    example = make(KEY, 4, 2, 2)
    x, flow = events(KEY, example, 3), example.flow(example.params)
    if not jax.tree.leaves(example.params) or jax.eval_shape(flow.forward, x) != jax.eval_shape(lambda: x):
        return  # no parameters to stack, or the output is no input of the next block
    two = Scan(example.flow, jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), example.params), flow.event_ndims_in)
    twice = distrax.Chain([flow, flow])
    scanned, chained = jax.jit(lambda x: (two.forward_and_log_det(x), twice.forward_and_log_det(x)))(x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), scanned, chained)


def test_a_flow_makes_a_density_of_distrax():
    example = dense(KEY, 4, 1, 1)
    flow, x = example.flow(example.params), events(KEY, example, 3)
    normal = distrax.MultivariateNormalDiag(jnp.zeros(4), jnp.ones(4))
    density: Any = distrax.Transformed(normal, distrax.Inverse(flow))
    z, log_det = flow.forward_and_log_det(x)
    np.testing.assert_allclose(density.log_prob(x), normal.log_prob(z) + log_det, rtol=1e-5)
    assert density.sample(seed=KEY, sample_shape=(2,)).shape == (2, 4)


@every_kind
def test_large_inputs_stay_finite(make):
    """The log scales are bounded, so that no exponential overflows; gradients too."""
    example = make(KEY, 4, 2, 2)

    @jax.jit
    def run(p: Any, x: Any) -> Any:
        def total(p: Any, x: Any) -> Any:
            y, log_det = example.flow(p).forward_and_log_det(x)
            return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(y)) + log_det.sum()

        y = example.flow(p).forward(x)
        return y, example.flow(p).inverse(jax.tree.map(lambda leaf: leaf / 1e3, y)), jax.grad(total, (0, 1))(p, x)

    for scale in (1e3, -1e3):
        x = jax.tree.map(lambda leaf, scale=scale: jnp.full_like(leaf, scale), events(KEY, example, 2))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(run(example.params, x)))


def test_a_scan_is_the_chain_of_its_blocks_and_compiles_one_block():
    example = chain_of_blocks(KEY, 4, 2, 2)
    apply = network(KEY, 2, 2, True)[1]
    blocks = [glow_block(jax.tree.map(lambda leaf, i=i: leaf[i], example.params), 4, apply) for i in range(3)]
    x = events(KEY, example, 5)
    chained = distrax.Chain(blocks[::-1]).forward_and_log_det(x)
    for remat in (False, True):
        block = functools.partial(glow_block, c=4, apply=apply)
        scanned = Scan(block, example.params, 3, remat=remat, unrolled=remat).forward_and_log_det(x)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), scanned, chained)
    length = {}
    for n in (2, 8):
        params = jax.tree.map(lambda leaf, n=n: jnp.concatenate([leaf] * n)[:n], example.params)
        length[n] = len(
            jax.jit(lambda p, x: Scan(block, p, 3, unrolled=False).forward(x)).lower(params, x).as_text().splitlines()
        )
    assert length[2] == length[8]


@pytest.mark.slow
def test_remat_stores_less_for_the_gradient():
    example = chain_of_blocks(KEY, 8, 2, 2)
    block = functools.partial(glow_block, c=8, apply=network(KEY, 4, 4, True)[1])
    params = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * 8), example.params)
    x = jax.ShapeDtypeStruct((4, 64, 64, 8), jnp.float32)
    sizes = []
    for remat in (False, True):
        loss = jax.grad(
            lambda p, x, remat=remat: jnp.sum(Scan(block, p, 3, remat=remat, unrolled=False).forward(x) ** 2)
        )
        sizes.append(jax.jit(loss).lower(params, x).compile().memory_analysis().temp_size_in_bytes)
    assert sizes[1] < 0.6 * sizes[0]


def test_scan_init_initializes_blocks_from_their_inputs():
    """Every ActNorm normalizes its own input."""
    block = functools.partial(glow_block, c=4, apply=network(KEY, 2, 2, True)[1])
    x = 3 + 2 * jax.random.normal(KEY, (40, 2, 2, 4))
    params, output = scan_init(glow_init, block, KEY, 3, x)
    for i in range(3):
        block_params = jax.tree.map(lambda leaf, i=i: leaf[i], params)
        y = ActNorm(*block_params[0], 3).forward(x)
        np.testing.assert_allclose(y.std((0, 1, 2)), 1, atol=1e-3)
        x = block(block_params).forward(x)
    np.testing.assert_allclose(output, x, rtol=1e-4, atol=1e-4)
