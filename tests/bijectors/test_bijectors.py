"""Every bijector is one: its inverse, and its log-determinant against the Jacobian, on random shapes and parameters."""

import functools
import inspect
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
    channel_mask,
    checkerboard_mask,
    coupling,
    glow_coupling,
    half_mask,
    lu_matrix,
    masked_coupling,
    quadrant_mask,
    random_orthogonal,
    scan_init,
    soft_clamp,
)

KEY = jax.random.key(0)


def weights(key: Any, rows: int, columns: int) -> Any:
    return jax.random.normal(key, (rows, columns)) / np.sqrt(rows)


def network(key: Any, given: int, moved: int, pixels: bool = False) -> Any:
    """(params, apply): a conditioner, which looks at neighbors too where its events are images."""
    hidden = 7
    params = weights(key, given, hidden), weights(jax.random.fold_in(key, 1), hidden, 2 * moved)

    def apply(params: Any, x: Any) -> Any:
        y = jnp.tanh(x @ params[0])
        y = y + jnp.roll(y, 1, -2) if pixels else y
        return y @ params[1]

    return params, apply


class Made(NamedTuple):
    params: Any
    flow: Callable[[Any], distrax.Bijector]
    shape: Any
    """Of one event, or of several images."""


def dense(key: Any, c: int, h: int, w: int, swap: bool = False, kind: str = "atan") -> Made:
    kept = c // 2 if swap else c - c // 2
    params, apply = network(key, kept, c - kept)
    options: dict[str, Any] = dict(clamp=1.5, kind=kind, event_ndims=1, swap=swap)
    return Made(params, lambda p: coupling(functools.partial(apply, p), c, **options), (c,))


def conditional(key: Any, c: int, h: int, w: int) -> Made:
    """On a code of the position, which is not part of the event."""
    code = jax.random.normal(jax.random.fold_in(key, 9), (3,))
    params, apply = network(key, c - c // 2 + 3, c // 2)

    def flow(p: Any) -> distrax.Bijector:
        def conditioner(x: Any) -> Any:
            return apply(p, jnp.concatenate([x, jnp.broadcast_to(code, (*x.shape[:-1], 3))], -1))

        return coupling(conditioner, c, clamp=1.9, kind="tanh", event_ndims=1)

    return Made(params, flow, (c,))


def convolutional(key: Any, c: int, h: int, w: int) -> Made:
    first, apply = network(key, c // 2, c - c // 2, True)
    second, other = network(jax.random.fold_in(key, 2), c - c // 2, c // 2, True)

    def flow(p: Any) -> distrax.Bijector:
        both = functools.partial(apply, p[0]), functools.partial(other, p[1])
        return glow_coupling(both, c, clamp=3.0, kind="atan", event_ndims=3)

    return Made((first, second), flow, (h, w, c))


def masked(key: Any, c: int, h: int, w: int, mask: Any = checkerboard_mask, other: bool = False) -> Made:
    params, apply = network(key, c, c, True)
    m = jnp.asarray(mask(h, w, c, other))
    return Made(params, lambda p: masked_coupling(m, functools.partial(apply, p), clamp=2.0, kind="tanh"), (h, w, c))


def quadrants(key: Any, c: int, h: int, w: int) -> Made:
    """One quadrant moves, given another."""
    params, apply = network(key, c, c, True)
    keep, seen = ~quadrant_mask(h, w, c, 1), quadrant_mask(h, w, c, 0)

    def flow(p: Any) -> distrax.Bijector:
        return masked_coupling(jnp.asarray(keep), lambda x: apply(p, jnp.where(seen, x, 0)), clamp=2.0, kind="tanh")

    return Made(params, flow, (h, w, c))


def repeated_block(key: Any, c: int, h: int, w: int) -> Made:
    subnet, apply = network(key, c - c // 2, c // 2, True)
    params = block_params(subnet, c)._replace(shift=jax.random.normal(key, (c,)))
    mix = Permutation(jax.random.permutation(key, c), 3)

    def flow(p: Any) -> distrax.Bijector:
        return affine_block(p, functools.partial(apply, p.subnet), mix, clamp=1.9, event_ndims=3)

    return Made(params, flow, (h, w, c))


def cross_scale(key: Any, c: int, h: int, w: int) -> Made:
    shapes = (2 * h, 2 * w, c), (h, w, c)
    sizes = ((c // 2, c - c // 2), (c - c // 2, c // 2))
    params = tuple(network(jax.random.fold_in(key, i), 2 * a, b)[0] for i, (a, b) in enumerate(sizes))
    applies = tuple(network(key, 2 * a, b, True)[1] for a, b in sizes)

    def flow(p: Any) -> distrax.Bijector:
        def conditioner(params: Any, apply: Any, parts: Any) -> Any:
            fine, coarse = parts
            up = coarse.repeat(2, -3).repeat(2, -2)
            down = fine[..., ::2, ::2, :]
            return apply(params, jnp.concatenate([fine, up], -1)), apply(params, jnp.concatenate([down, coarse], -1))

        both = tuple(functools.partial(conditioner, q, f) for q, f in zip(p, applies, strict=True))
        return CrossScaleCoupling(both, c, clamp=3.0, kind="atan")

    return Made(params, flow, shapes)


def permutation(key: Any, c: int, h: int, w: int) -> Made:
    index = jax.random.permutation(key, c)
    return Made((), lambda p: Permutation(index, 3), (h, w, c))


def orthogonal(key: Any, c: int, h: int, w: int) -> Made:
    return Made(random_orthogonal(key, c), lambda p: Invertible1x1(p, 3, orthogonal=True), (h, w, c))


def invertible(key: Any, c: int, h: int, w: int) -> Made:
    matrix = random_orthogonal(key, c) + 0.2 * weights(key, c, c)
    return Made(matrix, lambda p: Invertible1x1(p, 1), (c,))


def by_lu(key: Any, c: int, h: int, w: int) -> Made:
    order = jax.random.permutation(key, c)
    params = LuFactors(0.3 * weights(key, c, c), jnp.linspace(-0.5, 0.5, c))

    def flow(p: LuFactors) -> distrax.Bijector:
        matrix, log_det = lu_matrix(p, order)
        return Invertible1x1(matrix, 3, log_det=log_det)

    return Made(params, flow, (h, w, c))


def act_norm(key: Any, c: int, h: int, w: int) -> Made:
    params = act_norm_init(jax.random.normal(key, (9, h, w, c)) * 3 + 1)
    return Made(params, lambda p: ActNorm(*p, 3), (h, w, c))


def squeeze(key: Any, c: int, h: int, w: int) -> Made:
    return Made((), lambda p: Squeeze(), (2 * h, 2 * w, c))


def glow_block(p: Any, c: int, apply: Any) -> distrax.Bijector:
    """ActNorm, 1x1 convolution, coupling."""
    norm, matrix, params = p
    moved = coupling(functools.partial(apply, params), c, clamp=1.0, kind="atan", event_ndims=3)
    return distrax.Chain([moved, Invertible1x1(matrix, 3), ActNorm(*norm, 3)])


def glow_init(key: Any, x: Any) -> Any:
    c = x.shape[-1]
    return act_norm_init(x), random_orthogonal(key, c), network(key, c - c // 2, c // 2, True)[0]


def chain_of_blocks(key: Any, c: int, h: int, w: int, remat: bool = False) -> Made:
    apply = network(key, c - c // 2, c // 2, True)[1]
    block = functools.partial(glow_block, c=c, apply=apply)
    params, _ = scan_init(glow_init, block, key, 3, jax.random.normal(key, (5, h, w, c)))
    return Made(params, lambda p: Scan(block, p, 3, remat=remat), (h, w, c))


def multi_scale(key: Any, c: int, h: int, w: int) -> Made:
    """Squeeze and blocks, twice, half of the channels leaving between."""
    made = [chain_of_blocks(jax.random.fold_in(key, i), n, h, w) for i, n in enumerate((4 * c, 8 * c))]

    def flow(p: Any) -> distrax.Bijector:
        levels = [distrax.Chain([m.flow(q), Squeeze()]) for m, q in zip(made, p, strict=True)]
        return MultiScale(levels, (4 * h, 4 * w, c))

    return Made(tuple(m.params for m in made), flow, (4 * h, 4 * w, c))


MAKERS = {
    "coupling": dense,
    "coupling, swapped, tanh": functools.partial(dense, swap=True, kind="tanh"),
    "coupling on a position code": conditional,
    "convolutional coupling of both parts": convolutional,
    "checkerboard": masked,
    "checkerboard, odd": functools.partial(masked, other=True),
    "channel mask": functools.partial(masked, mask=channel_mask),
    "channel mask, second": functools.partial(masked, mask=channel_mask, other=True),
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


every_bijector = pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
TWINS = ("odd", "second", "swapped, tanh", "remat")
"""The names of those that take the path of another."""
every_kind = pytest.mark.parametrize("maker", [maker for name, maker in MAKERS.items() if not name.endswith(TWINS)])


def events(key: Any, made: Made, *batch: int, scale: float = 1.0) -> Any:
    several = isinstance(made.shape[0], tuple)
    shapes = made.shape if several else (made.shape,)
    x = tuple(scale * jax.random.normal(jax.random.fold_in(key, i), (*batch, *shape)) for i, shape in enumerate(shapes))
    return x if several else x[0]


def flat(x: Any) -> Any:
    return jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(x)])


@functools.lru_cache(8)
def there_and_back(maker: Any, c: int, h: int, w: int) -> Any:
    def run(key: Any) -> Any:
        made = maker(key, c, h, w)
        flow = made.flow(made.params)
        x = events(jax.random.fold_in(key, 1), made)
        jacobian = jax.jacfwd(lambda v: flat(flow.forward(v)))(x)
        y, log_det = flow.forward_and_log_det(x)
        return x, flow.inverse_and_log_det(y), log_det, jacobian

    return jax.jit(run)


@every_bijector
@settings(deadline=None, max_examples=2)
@given(seed=st.integers(0, 2**16), c=st.integers(2, 5), h=st.integers(1, 2), w=st.integers(1, 2))
def test_the_inverse_and_the_log_determinant(maker, seed, c, h, w):
    x, (back, inverse_log_det), log_det, jacobian = there_and_back(maker, c, h, w)(jax.random.key(seed))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), back, x)
    assert log_det.shape == () and inverse_log_det.shape == ()
    matrix = np.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(jacobian)], 1)
    wanted = np.linalg.slogdet(np.asarray(matrix, np.float64))[1]
    np.testing.assert_allclose([log_det, -inverse_log_det], wanted, rtol=1e-3, atol=1e-3)


@every_kind
def test_the_same_under_jit_and_vmap_and_in_batches(maker):
    made = maker(KEY, 4, 2, 2)
    x = events(KEY, made, 2, 3)
    run = lambda p, x: made.flow(p).forward_and_log_det(x)  # noqa: E731
    plain = jax.jit(run)(made.params, x)
    assert plain[1].shape == (2, 3)
    mapped = jax.jit(jax.vmap(jax.vmap(run, (None, 0)), (None, 0)))(made.params, x)
    for other in (mapped, *([run(made.params, x)] if maker is dense else [])):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), other, plain)


@every_kind
def test_a_scan_of_two_is_twice_the_same(maker):
    made = maker(KEY, 4, 2, 2)
    x, flow = events(KEY, made, 3), made.flow(made.params)
    if not jax.tree.leaves(made.params) or jax.eval_shape(flow.forward, x) != jax.eval_shape(lambda: x):
        return  # nothing to stack, or no event to give to the next
    two = Scan(made.flow, jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), made.params), flow.event_ndims_in)
    got, wanted = jax.jit(lambda x: (two.forward_and_log_det(x), distrax.Chain([flow, flow]).forward_and_log_det(x)))(x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), got, wanted)


def test_a_flow_is_a_density_of_distrax():
    made = dense(KEY, 4, 1, 1)
    flow, x = made.flow(made.params), events(KEY, made, 3)
    normal = distrax.MultivariateNormalDiag(jnp.zeros(4), jnp.ones(4))
    density: Any = distrax.Transformed(normal, distrax.Inverse(flow))
    z, log_det = flow.forward_and_log_det(x)
    np.testing.assert_allclose(density.log_prob(x), normal.log_prob(z) + log_det, rtol=1e-5)
    assert density.sample(seed=KEY, sample_shape=(2,)).shape == (2, 4)


@every_kind
def test_large_inputs_stay_finite(maker):
    """The log scales are bounded, so that no exponential overflows; gradients too."""
    made = maker(KEY, 4, 2, 2)

    @jax.jit
    def run(p: Any, x: Any) -> Any:
        def total(p: Any, x: Any) -> Any:
            y, log_det = made.flow(p).forward_and_log_det(x)
            return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(y)) + log_det.sum()

        y = made.flow(p).forward(x)
        return y, made.flow(p).inverse(jax.tree.map(lambda leaf: leaf / 1e3, y)), jax.grad(total, (0, 1))(p, x)

    for scale in (1e3, -1e3):
        x = jax.tree.map(lambda leaf, scale=scale: jnp.full_like(leaf, scale), events(KEY, made, 2))
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(run(made.params, x)))


def test_a_scan_is_the_chain_of_its_blocks_and_compiles_one_of_them():
    made = chain_of_blocks(KEY, 4, 2, 2)
    apply = network(KEY, 2, 2, True)[1]
    blocks = [glow_block(jax.tree.map(lambda leaf, i=i: leaf[i], made.params), 4, apply) for i in range(3)]
    x = events(KEY, made, 5)
    wanted = distrax.Chain(blocks[::-1]).forward_and_log_det(x)
    for remat in (False, True):
        block = functools.partial(glow_block, c=4, apply=apply)
        got = Scan(block, made.params, 3, remat=remat, unrolled=remat).forward_and_log_det(x)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, wanted)
    length = {}
    for n in (2, 8):
        params = jax.tree.map(lambda leaf, n=n: jnp.concatenate([leaf] * n)[:n], made.params)
        length[n] = len(
            jax.jit(lambda p, x: Scan(block, p, 3, unrolled=False).forward(x)).lower(params, x).as_text().splitlines()
        )
    assert length[2] == length[8]


def test_remat_keeps_less_for_the_gradient():
    made = chain_of_blocks(KEY, 8, 2, 2)
    block = functools.partial(glow_block, c=8, apply=network(KEY, 4, 4, True)[1])
    params = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * 8), made.params)
    x = jax.ShapeDtypeStruct((4, 64, 64, 8), jnp.float32)
    needed = []
    for remat in (False, True):
        loss = jax.grad(
            lambda p, x, remat=remat: jnp.sum(Scan(block, p, 3, remat=remat, unrolled=False).forward(x) ** 2)
        )
        needed.append(jax.jit(loss).lower(params, x).compile().memory_analysis().temp_size_in_bytes)
    assert needed[1] < 0.6 * needed[0]


def test_actnorm_begins_with_mean_0_and_variance_1():
    x = 5 + 3 * np.random.default_rng(0).normal(size=(64, 4, 4, 3)).astype(np.float32)
    valid = np.arange(64) < 50
    x[50:] = np.nan
    made = jax.jit(act_norm_init)(np.where(valid[:, None, None, None], x, 0), valid)
    y = ActNorm(*made, 3).forward(jnp.asarray(x[:50]))
    np.testing.assert_allclose(y.mean((0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(y.std((0, 1, 2)), 1, atol=1e-4)


def test_scan_init_sees_what_reaches_each_block():
    """Every ActNorm has normalized what came to it."""
    block = functools.partial(glow_block, c=4, apply=network(KEY, 2, 2, True)[1])
    x = 3 + 2 * jax.random.normal(KEY, (40, 2, 2, 4))
    params, end = scan_init(glow_init, block, KEY, 3, x)
    for i in range(3):
        own = jax.tree.map(lambda leaf, i=i: leaf[i], params)
        y = ActNorm(*own[0], 3).forward(x)
        np.testing.assert_allclose(y.std((0, 1, 2)), 1, atol=1e-3)
        x = block(own).forward(x)
    np.testing.assert_allclose(end, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["atan", "tanh"])
def test_soft_clamp(kind):
    x = jnp.linspace(-1e3, 1e3, 101)
    y = soft_clamp(x, 2.0, kind)
    assert (jnp.abs(y) <= 2).all() and (jnp.diff(y) >= 0).all()
    slope = {"atan": 2 / np.pi, "tanh": 1.0}[kind]
    np.testing.assert_allclose(soft_clamp(jnp.float32(1e-3), 2.0, kind), slope * 1e-3, rtol=1e-4)


def test_masks_split_every_image_in_halves():
    for mask in (checkerboard_mask, channel_mask, half_mask):
        one, other = mask(4, 6, 2), mask(4, 6, 2, True)
        assert (one ^ other).all() and one.sum() == other.sum()
    assert checkerboard_mask(2, 2, 1)[..., 0].tolist() == [[True, False], [False, True]]
    assert half_mask(2, 2, 1)[..., 0].tolist() == [[True, True], [False, False]]
    corners = [np.argwhere(quadrant_mask(2, 2, 1, i)[..., 0]).tolist() for i in range(5)]
    assert corners == [[[0, 0]], [[0, 1]], [[1, 1]], [[1, 0]], [[0, 0]]]


def test_squeeze_puts_blocks_into_channels():
    x = jnp.arange(16.0).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(Squeeze().forward(x)[0, 0, 0], [0, 1, 4, 5])


@pytest.mark.parametrize(
    ("call", "rule"),
    [
        (lambda: soft_clamp(jnp.zeros(1), 0.0, "atan"), "clamp must be above 0, got 0"),
        (lambda: inspect.unwrap(soft_clamp)(jnp.zeros(1), 1.0, "sin"), 'must be "atan" or "tanh", got "sin"'),
        (lambda: Squeeze().forward(jnp.zeros((3, 4, 1))), "even height and width, got 3 x 4"),
    ],
)
def test_rules(call, rule):
    with pytest.raises(ValueError, match=rule):
        call()
