"""Synthetic anomalies: what holds for all of them, and each against an independent computation."""

import functools
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv
from PIL import Image, ImageEnhance, ImageOps
from scipy import ndimage, stats

from jaxad.synthesis import anomaly, color, cutpaste, nsa, perlin, poisson, texture, warp

SIZE = (48, 64)
SOURCE = jnp.asarray(np.random.default_rng(9).random((*SIZE, 3), np.float32))


def shown(image: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The image, negative within the mask."""
    return jnp.where(mask[..., None], 1 - image, image), mask


GENERATORS = {
    "cutpaste": cutpaste.cutpaste,
    "cutpaste rotated": functools.partial(cutpaste.cutpaste, degrees=45.0),
    "scar": cutpaste.scar,
    "textured": lambda key, image: anomaly.textured(key, image, SOURCE),
    "made-up texture": lambda key, image: anomaly.textured(
        jax.random.fold_in(key, 0), image, texture.source(jax.random.fold_in(key, 1), SIZE, None, texture.BOLD_CHANGES)
    ),
    "shuffled": lambda key, image: anomaly.textured(
        jax.random.fold_in(key, 0),
        image,
        anomaly.shuffled(jax.random.fold_in(key, 1), image),
        foreground=anomaly.foreground(image),
    ),
    "shape": lambda key, image: shown(image, perlin.perlin_mask(key, SIZE)),
    "fractal shape": lambda key, image: shown(image, perlin.perlin_mask(key, SIZE, octaves=3)),
    "three-way": lambda key, image: jax.tree.map(lambda x: x[1], cutpaste.three_way(key, image)),
    "confetti": anomaly.confetti,
    "natural": lambda key, image: nsa.natural(key, image, SOURCE),
    "natural mixed": lambda key, image: nsa.natural(key, image, SOURCE, mixed=True, labels="binary"),
}
seeds = st.integers(0, 2**31 - 1)


def noise(seed: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).random((*SIZE, 3), np.float32))


@functools.cache
def program(name: str):
    return jax.jit(GENERATORS[name]), jax.jit(jax.vmap(GENERATORS[name]))


@pytest.mark.parametrize("name", GENERATORS)
@given(seeds)
@settings(deadline=None, max_examples=10)
def test_a_mask_is_where_pixels_changed(name, seed):
    image = noise(seed)
    made, mask = program(name)[0](jax.random.key(seed), image)
    assert made.shape == image.shape and made.dtype == jnp.float32 and mask.shape == SIZE
    assert float(made.min()) >= 0 and float(made.max()) <= 1
    changed = np.asarray(jnp.abs(made - image).max(-1)) > 1e-6
    where = np.asarray(mask) > 0
    if name.startswith("natural"):  # the label is smoothed, and a change of a level is none
        assert (np.abs(made - image).mean(-1)[ndimage.minimum_filter(~where, 5)] <= 2 / 255).mean() > 0.9
        assert not where[~ndimage.maximum_filter(changed, 5)].any()
    else:
        assert not changed[~where].any() and (~changed)[where].sum() <= 0.02 * where.sum()


def test_textures_stay_in_the_foreground():
    keys, within = jax.random.split(jax.random.key(0), 20), jnp.zeros(SIZE, bool).at[10:30, 20:40].set(True)
    draw = lambda within: jax.vmap(lambda key: anomaly.textured(key, noise(0), SOURCE, foreground=within)[1])(keys)  # noqa: E731
    found, anywhere = np.asarray(draw(within)), np.asarray(draw(None))
    assert found.any() and (anywhere & ~np.asarray(within)).any()
    np.testing.assert_array_equal(found, anywhere & np.asarray(within))


@pytest.mark.parametrize("name", GENERATORS)
def test_a_key_makes_one_anomaly_also_among_others(name):
    one, many = program(name)
    keys, images = jax.random.split(jax.random.key(3), 4), jnp.stack([noise(i) for i in range(4)])
    made, mask = many(keys, images)
    for i in range(4):
        own = one(keys[i], images[i])
        np.testing.assert_allclose(made[i], own[0], atol=2e-3)
        assert (np.abs(np.asarray(mask[i], np.float32) - np.asarray(own[1], np.float32)) < 1e-2).mean() > 0.99
    np.testing.assert_array_equal(one(keys[0], images[0])[0], one(keys[0], images[0])[0])
    assert len({np.asarray(one(key, images[0])[0]).tobytes() for key in keys}) > 1


def classical_perlin(angles, size, cells):
    """Perlin's noise pixel by pixel."""

    def fade(t):
        return 6 * t**5 - 15 * t**4 + 10 * t**3

    out = np.zeros(size)
    for y, x in np.ndindex(*size):
        v, u = y * cells[0] / size[0], x * cells[1] / size[1]
        i, j = int(v), int(u)
        corner = {
            (a, b): np.cos(angles[i + a, j + b]) * (u - j - b) + np.sin(angles[i + a, j + b]) * (v - i - a)
            for a in (0, 1)
            for b in (0, 1)
        }
        left, right = ((1 - fade(v - i)) * corner[0, b] + fade(v - i) * corner[1, b] for b in (0, 1))
        out[y, x] = np.sqrt(2) * ((1 - fade(u - j)) * left + fade(u - j) * right)
    return out


@pytest.mark.parametrize(("size", "cells", "most"), [((20, 31), (3, 5), 5), ((16, 16), (1, 4), 8), ((7, 9), (2, 2), 2)])
def test_perlin_noise_is_the_classical_one(size, cells, most):
    key = jax.random.key(1)
    angles = np.asarray(jax.random.uniform(key, (most + 1, most + 1), maxval=2 * jnp.pi), np.float64)
    found = jax.jit(perlin.perlin_noise, static_argnums=(1, 3))(key, size, jnp.asarray(cells), most)
    np.testing.assert_allclose(found, classical_perlin(angles, size, cells), atol=1e-5)
    assert float(jnp.abs(found).max()) <= 1


def test_fractal_noise_adds_octaves():
    key = jax.random.key(0)
    parts = [perlin.perlin_noise(jax.random.fold_in(key, i), (24, 30), (2 << i, 3 << i)) for i in range(3)]
    expected = sum(0.5**i * part for i, part in enumerate(parts)) / np.sqrt(1 + 0.25 + 0.0625)
    np.testing.assert_allclose(perlin.fractal_noise(key, (24, 30), (2, 3), 3), expected, atol=1e-5)


@pytest.mark.parametrize(("size", "last"), [((256, 256), 6), ((288, 300), 6), ((128, 160), 5), ((64, 64), 4)])
def test_the_smallest_cells_of_a_mask_have_about_8_pixels(size, last):
    """So that DRAEM's 256 px have what its code has."""
    key = jax.random.key(3)
    np.testing.assert_array_equal(perlin.perlin_mask(key, size), perlin.perlin_mask(key, size, (0, last)))
    assert (perlin.perlin_mask(key, size) != perlin.perlin_mask(key, size, (0, last + 1))).any()


def test_octaves_make_borders_rough_and_leave_the_area():
    keys = jax.random.split(jax.random.key(1), 48)
    make = functools.partial(perlin.perlin_mask, size=(128, 128), degrees=0.0)

    def border(options: dict) -> float:
        """Pixels on borders for each within."""
        masks = np.asarray(jax.vmap(lambda key: make(key, **options))(keys))
        assert 0.02 < masks.mean() < 0.15
        return sum((m & ~ndimage.binary_erosion(m)).sum() for m in masks) / masks.sum()

    one, several = (border(dict(exponents=(1, 2), octaves=octaves)) for octaves in (1, 5))
    assert several > 1.5 * one
    assert border(dict(octaves=4)) > 0


@pytest.mark.parametrize("degrees", [-63.0, 0.0, 20.0, 90.0])
def test_rotation_is_scipys(degrees):
    image = np.random.default_rng(0).random((21, 30, 3), np.float32)
    expected = ndimage.rotate(image, degrees, reshape=False, order=1, mode="grid-constant")
    found = np.asarray(warp.rotate(jnp.asarray(image), degrees))
    np.testing.assert_allclose(found, expected, atol=1e-3)


@given(seeds)
@settings(deadline=None, max_examples=20)
def test_cutpaste_pastes_a_rectangle_of_the_image(seed):
    image = noise(seed)
    make = jax.jit(functools.partial(cutpaste.cutpaste, jitter=0.0))
    made, mask = (np.asarray(x) for x in make(jax.random.key(seed), image))
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    h, w = len(rows), len(columns)
    assert mask.sum() == h * w and 0.3 * 0.8 < h / w < 1 / (0.3 * 0.8)
    assert 0.02 * 0.8 < mask.mean() < 0.15 * 1.2
    piece = made[rows[0] : rows[0] + h, columns[0] : columns[0] + w]
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(image), (h, w, 3))[:, :, 0]
    assert (windows == piece).all((2, 3, 4)).any()


@given(seeds)
@settings(deadline=None, max_examples=20)
def test_a_scar_has_the_published_size(seed):
    image = jnp.zeros((256, 256, 3)).at[:].set(0.5)
    mask = np.asarray(jax.jit(cutpaste.scar)(jax.random.key(seed), image)[1])
    inside = mask[0].sum() + mask[-1].sum() + mask[:, 0].sum() + mask[:, -1].sum() == 0
    assert mask.sum() <= 17 * 26 and (not inside or mask.sum() >= 2 * 10 * 0.7)
    assert np.ptp(np.flatnonzero(mask.any(1))) <= 32 and np.ptp(np.flatnonzero(mask.any(0))) <= 32


@given(seeds)
@settings(deadline=None, max_examples=20)
def test_a_rotated_rectangle_is_whole_and_shows_the_image(seed):
    """The window that is computed cuts nothing off, and the piece is the one that is pasted without a rotation."""
    image = jnp.asarray(np.random.default_rng(seed).permutation(96 * 96).reshape(96, 96, 1) * np.ones(3), jnp.float32)
    makes = (jax.jit(functools.partial(cutpaste.cutpaste, degrees=degrees, jitter=0.0)) for degrees in (0.0, 45.0))
    straight, turned = ([np.asarray(x) for x in make(jax.random.key(seed), image)] for make in makes)
    mask = turned[1]
    if not (mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any()):
        np.testing.assert_allclose(mask.sum(), straight[1].sum(), rtol=0.1, atol=8)
    assert np.isin(turned[0][mask][:, 0], straight[0][straight[1]][:, 0]).mean() > 0.99


def test_the_three_ways():
    images, masks = cutpaste.three_way(jax.random.key(0), noise(0))
    np.testing.assert_array_equal(images[0], noise(0))
    assert not masks[0].any() and masks[1].sum() > masks[2].sum() > 0


def test_colors_against_matplotlib():
    image = noise(1)
    hsv = rgb_to_hsv(np.asarray(image, np.float64))
    hsv = np.stack([(hsv[..., 0] + 0.3) % 1, np.minimum(hsv[..., 1] + 0.1, 1), hsv[..., 2]], -1)
    np.testing.assert_allclose(color.other_hue(image, jnp.float32(0.3), 0.1), hsv_to_rgb(hsv), atol=1e-4)


@given(seeds)
@settings(deadline=None, max_examples=20)
def test_jitter_changes_every_property_by_its_strength_at_most(seed):
    image, key = noise(seed) * 0.5 + 0.25, jax.random.key(seed)
    jitter = jax.jit(color.color_jitter, static_argnums=2)
    np.testing.assert_allclose(jitter(key, image, 0.0), image, atol=1e-5)
    made = np.asarray(jitter(key, image, 0.1))
    assert 0 < np.abs(made - image).max() < 0.4
    assert 0.9 * 0.98 < made.mean() / image.mean() < 1.1 * 1.02
    assert 0.9 * 0.85 < made.std() / np.asarray(image).std() < 1.1 * 1.15


def test_levels_are_mapped_as_pillow_does():
    rng = np.random.default_rng(0)
    levels = rng.integers(40, 200, (32, 32, 3))
    levels[..., 1] = rng.integers(0, 256, (32, 32)) ** 2 // 256
    photograph = Image.fromarray(levels.astype(np.uint8))
    count = texture.histogram(jnp.asarray(levels))
    of = [np.bincount(levels[..., c].ravel(), minlength=256) for c in range(3)]
    np.testing.assert_array_equal(count, np.stack(of))
    tables = np.asarray(texture.tables(jax.random.key(0), count))
    mapped = dict(zip(texture.BOLD, tables[:, np.arange(3), levels], strict=False))
    mapped |= {
        f"autocontrast {cut}": np.asarray(texture.autocontrast(count, jnp.float32(cut)))[np.arange(3), levels]
        for cut in (0, 7, 60)
    }
    for name, expected in (
        ("autocontrast 0", ImageOps.autocontrast(photograph)),
        ("autocontrast 7", ImageOps.autocontrast(photograph, 7)),
        ("autocontrast 60", photograph),  # of which nothing is left
        ("equalize", ImageOps.equalize(photograph)),
        ("invert", ImageOps.invert(photograph)),
    ):
        found = np.clip(255 * mapped[name], 0, 255)
        np.testing.assert_allclose(found, np.asarray(expected), atol=1.01, err_msg=name)
    gamma, brightness = (255 * mapped[name] for name in ("gamma", "brightness"))
    assert ((levels / 255) ** 2 * 255 - 0.1 <= gamma).all() and (gamma <= (levels / 255) ** 0.5 * 255 + 0.1).all()
    assert (0.8 * levels - 30.1 <= brightness).all() and (brightness <= 1.2 * levels + 30.1).all()
    assert (mapped["posterize"] <= levels / 255 + 1e-6).all()
    assert tables.min() >= 0 and tables.max() <= 1


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 2.0])
def test_sharpness_is_pillows(factor):
    levels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    expected = np.asarray(ImageEnhance.Sharpness(Image.fromarray(levels)).enhance(factor))
    found = 255 * texture.sharper(jnp.asarray(levels, jnp.float32) / 255, jnp.float32(factor))
    np.testing.assert_allclose(found[1:-1, 1:-1], expected[1:-1, 1:-1], atol=2)


@pytest.mark.parametrize(
    ("change", "which"),
    [(c.change, i) for c in (texture.BOLD_CHANGES, texture.GENTLE_CHANGES) for i in range(c.count)],
)
def test_every_change_changes_a_texture_within_the_range_of_colors(change, which):
    image = noise(3) * 0.6 + 0.2
    change = jax.jit(change)
    made = np.stack([change(jax.random.key(i), image, jnp.int32(which)) for i in range(8)])
    assert made.min() >= 0 and made.max() <= 1
    assert (np.abs(made - np.asarray(image)).max((1, 2, 3)) > 0.01).sum() >= 4


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mirror", ImageOps.mirror),
        ("flip", ImageOps.flip),
        ("gray", lambda image: image.convert("L").convert("RGB")),
        ("autocontrast", ImageOps.autocontrast),
        ("equalize", ImageOps.equalize),
    ],
)
def test_gentle_changes_are_pillows(name, expected):
    levels = np.random.default_rng(0).integers(20, 200, (20, 30, 3), np.uint8)
    which = jnp.int32(texture.GENTLE.index(name))
    found = 255 * jax.jit(texture.gentle_change)(jax.random.key(0), jnp.asarray(levels, jnp.float32) / 255, which)
    np.testing.assert_allclose(found, np.asarray(expected(Image.fromarray(levels)), np.float32), atol=1.001)


def test_a_third_of_gently_changed_textures_is_gray():
    keys = jax.random.split(jax.random.key(0), 300)
    made = jax.vmap(lambda key: texture.changed(key, noise(3), texture.GENTLE_CHANGES))(keys)
    gray = np.asarray(jnp.ptp(made, -1).max((1, 2)) < 1e-5).mean()
    assert abs(gray - 1 / 3) < 0.09


def test_a_source_is_one_of_the_textures_given():
    textures = np.random.default_rng(0).integers(0, 256, (5, 24, 32, 3), np.uint8)
    found = texture.source(jax.random.key(0), (24, 32), jnp.asarray(textures), None)
    assert (np.abs(np.asarray(found) - textures / 255).max((1, 2, 3)) < 1e-6).sum() == 1
    assert texture.source(jax.random.key(0), (48, 40), jnp.asarray(textures), None).shape == (48, 40, 3)


def test_foreground_is_otsus_and_not_the_border():
    rng = np.random.default_rng(0)
    object_ = np.zeros(SIZE, bool)
    object_[10:40, 12:50] = True
    for dark, bright in ((0.2, 0.8), (0.8, 0.2)):
        image = np.where(object_, bright, dark)[..., None] + rng.normal(0, 0.05, (*SIZE, 3))
        found = np.asarray(anomaly.foreground(jnp.asarray(np.clip(image, 0, 1), jnp.float32)))
        assert (found == object_).mean() > 0.99


def test_foreground_threshold_maximizes_the_variance_between():
    image = np.clip(np.random.default_rng(1).normal(0.5, 0.2, (*SIZE, 3)), 0, 1).astype(np.float32)
    level = np.asarray(jnp.round(color.gray_of(jnp.asarray(image))[..., 0] * 255)).astype(int)

    def between(t):
        low, high = level[level <= t], level[level > t]
        return len(low) * len(high) * (low.mean() - high.mean()) ** 2 if len(low) and len(high) else 0

    bright = level > max(range(256), key=between)
    found = np.asarray(anomaly.foreground(jnp.asarray(image)))
    assert (found == bright).all() or (found == ~bright).all()


def test_tiles_are_shuffled_none_is_lost():
    with pytest.raises(ValueError, match=r"multiples of 4 x 8 pixels for as many tiles, got 50 x 64"):
        anomaly.shuffled(jax.random.key(0), jnp.zeros((50, 64, 3)))
    assert anomaly.shuffled(jax.random.key(0), noise(0)).shape == (*SIZE, 3)
    image = np.asarray(noise(0))
    made = np.asarray(anomaly.permuted(jax.random.key(0), jnp.asarray(image), (4, 8)))

    def tiles(image):
        return {image[i : i + 12, j : j + 8].tobytes() for i in range(0, 48, 12) for j in range(0, 64, 8)}

    assert len(tiles(image)) == 32 and tiles(made) == tiles(image) and not np.array_equal(made, image)


MASKS = {
    "rectangle": lambda: np.pad(np.ones((18, 26), bool), ((9, 21), (5, 33))),
    "blob": lambda: ndimage.gaussian_filter(np.random.default_rng(0).normal(size=SIZE), 3) > 0.03,
    "pixel": lambda: np.pad(np.ones((1, 1), bool), ((9, 38), (5, 58))),
}


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("name", MASKS)
def test_seamless_cloning_is_the_sparse_solution(name, mixed):
    target, source, mask = np.asarray(noise(0), np.float64) * 0.2 + 0.4, np.asarray(noise(1), np.float64), MASKS[name]()
    smooth = np.stack([ndimage.gaussian_filter(source[..., c], 4) for c in range(3)], -1)
    found = np.asarray(
        jax.jit(poisson.seamless_clone)(
            jnp.asarray(target, jnp.float32), jnp.asarray(smooth, jnp.float32), jnp.asarray(mask), mixed
        )
    )
    inner = mask.copy()
    inner[[0, -1]] = inner[:, [0, -1]] = False
    number = np.full(SIZE, -1)
    number[inner] = np.arange(inner.sum())
    matrix = scipy.sparse.lil_array((inner.sum(), inner.sum()))
    right = np.zeros((inner.sum(), 3))
    for y, x in np.argwhere(inner):
        i = number[y, x]
        matrix[i, i] = 4
        for p, q in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            own, other = smooth[y, x] - smooth[p, q], target[y, x] - target[p, q]
            right[i] += np.where(mixed & (np.abs(other) > np.abs(own)), other, own)
            if inner[p, q]:
                matrix[i, number[p, q]] = -1
            else:
                right[i] += target[p, q]
    expected = target.copy()
    expected[inner] = scipy.sparse.linalg.spsolve(matrix.tocsc(), right).reshape(-1, 3)
    np.testing.assert_allclose(found, np.clip(expected, 0, 1), atol=1e-3)
    np.testing.assert_array_equal(found[~inner], target.astype(np.float32)[~inner])


@given(seeds)
@settings(deadline=None, max_examples=10)
def test_confetti_has_sizes_in_range(seed):
    """One rectangle, not rotated: both sides are drawn, and what lies beyond the image is missing."""
    image = noise(seed)
    _, mask = jax.jit(functools.partial(anomaly.confetti, most=1, degrees=0.0))(jax.random.key(seed), image)
    rows, columns = np.asarray(mask).any(1), np.asarray(mask).any(0)
    least, most = 8 / 240 * SIZE[0], 54 / 240 * SIZE[0]
    for along in (rows, columns):
        assert along.sum() <= most + 1 and (along[0] or along[-1] or along.sum() >= least - 1)
    assert mask.sum() == rows.sum() * columns.sum() > 0


def test_halves_of_natural_pieces_follow_a_gamma_distribution_between_two_limits():
    dims = jnp.asarray([200.0, 300.0])
    keys = jax.random.split(jax.random.key(0), 2000)
    found = np.asarray(jax.vmap(lambda key: nsa.half_sides(key, dims, nsa.Sizes(0.06, 0.2)) / dims)(keys))
    drawn = stats.gamma(2.0, loc=0.03, scale=0.05)
    np.testing.assert_allclose((found.min(), found.max()), (0.06, 0.2), rtol=1e-6)
    for share, limit in ((drawn.cdf(0.06), found < 0.06001), (drawn.sf(0.2), found > 0.19999)):
        np.testing.assert_allclose(limit.mean(), share, atol=0.03)
    between = found[(found > 0.06001) & (found < 0.19999)]
    low, high = drawn.cdf([0.06, 0.2])
    assert stats.kstest(between, lambda x: (drawn.cdf(x) - low) / (high - low)).pvalue > 1e-3


LABELED = {
    labels: jax.jit(functools.partial(nsa.natural, pieces=1, sizes=nsa.Sizes(0.2, 0.4), labels=labels))
    for labels in get_args(nsa.Label)
}


@given(seeds)
@settings(deadline=None, max_examples=15)
def test_natural_pieces_have_sizes_in_range_and_labels_by_intensity(seed):
    image = jnp.broadcast_to(jnp.asarray(0.5), (*SIZE, 3))
    made, _ = LABELED["binary"](jax.random.key(seed), image, SOURCE)
    changed = np.asarray(jnp.abs(made - image).max(-1)) > 1e-5
    for side, n in zip((changed.any(1).sum(), changed.any(0).sum()), SIZE, strict=True):
        assert 0.2 * n - 4 <= side <= 0.4 * n + 1
    change = np.abs(np.asarray(made, np.float64) - 0.5).mean(-1)
    around = functools.partial(ndimage.uniform_filter, mode="constant")
    mask = around((change > 1 / 255).astype(float), 5) > 0.5
    intensity = 255 * around(change * mask, 11) / np.maximum(around(mask.astype(float), 11), 1e-6)
    for labels, expected in (
        ("logistic", mask / (1 + np.exp(-(intensity - 20) / 6))),
        ("intensity", mask * intensity / 255),
        ("binary", mask),
    ):
        same, label = LABELED[labels](jax.random.key(seed), image, SOURCE)
        np.testing.assert_allclose(same, made, atol=1e-5)
        assert (np.abs(np.asarray(label) - expected) < 5e-3).mean() > 0.99


def test_natural_pieces_show_objects_where_objects_are():
    left, right = (np.zeros(SIZE, bool) for _ in range(2))
    left[:, :32], right[:, 32:] = True, True
    image = noise(0)
    make = jax.jit(functools.partial(nsa.natural, pieces=1, labels="binary"), static_argnames="least_overlap")

    def overlaps(least: float) -> list[float]:
        """What of each piece lies on the target's object; at least a quarter of it shows the other's."""
        options = dict(foregrounds=(left, right), least_overlap=least)
        masks = [np.asarray(make(jax.random.key(i), image, SOURCE, **options)[1]) for i in range(12)]
        return [float(mask[left].mean() / mask.mean() / 2) for mask in masks if mask.any()]

    some, more = overlaps(0.25), overlaps(0.8)
    assert len(some) > 6 and min(some) > 0.05
    assert len(more) > 6 and min(more) > 0.8 * 0.25 - 0.05 and np.mean(more) > np.mean(some)
    nowhere = make(jax.random.key(0), image, SOURCE, foregrounds=(left, np.zeros(SIZE, bool)))
    np.testing.assert_array_equal(nowhere[0], image)
