"""PatchCore: its banks, collected, streamed, updated and in ensembles."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import cdist

from jaxad.base import Batch, MonotoneMethod
from jaxad.methods.patchcore import PatchcoreBank, patchcore, update
from tests.examples import slow_after

jit_update = jax.jit(update, static_argnames=("size", "projection_dim"))
GRIDS = (4, 4), (2, 2)
OPTIONS = dict(backbone="pdn_small", layers=("layer1", "layer2"), image_size=(16, 16), sigma=0.0)

PATCHES_AND_NEIGHBORS = jnp.int32(8), jnp.int32(1)


def feature_maps(seed, n, channels=(3, 4)):
    rng = np.random.default_rng(seed)
    shapes = zip(("layer1", "layer2"), GRIDS, channels, strict=True)
    return {layer: jnp.asarray(rng.normal(size=(n, *grid, c)), jnp.float32) for layer, grid, c in shapes}


def fit(method, x, key=0):
    n = x["layer1"].shape[0]
    batch = Batch(x, jnp.ones(n, bool), jnp.zeros(n, jnp.int32), None, jnp.arange(n, dtype=jnp.int32))

    @jax.jit
    def run(key, batch):
        stage = method.stages[0]
        state, _ = stage.update(key, stage.init(key, None, None, x), None, batch)
        return stage.finalize(key, state, None)

    return run(jax.random.key(key), batch)


def patches(x):
    """Eq. 1-2: 3x3 means with zeros beyond the border, the coarser stage upsampled bilinearly from 2x2 to 4x4."""

    def mean(m):
        padded = np.pad(np.asarray(m, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
        return sum(padded[:, i : i + m.shape[1], j : j + m.shape[2]] for i in range(3) for j in range(3)) / 9

    fine, coarse = mean(x["layer1"]), mean(x["layer2"])
    weight = np.array([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]])
    up = np.einsum("Hh,bhwc,Ww->bHWc", weight, coarse, weight)
    return np.concatenate([fine, up], -1).reshape(len(fine), 16, -1)


TRAIN, TEST = feature_maps(0, 6), feature_maps(1, 3)


def test_paper_scores_do_not_overflow():
    method = patchcore(coreset_sampling_ratio=1.0, scoring="paper", **OPTIONS)
    scores = jax.jit(method.score)(fit(method, TRAIN), None, jax.tree.map(lambda leaf: leaf * 1e4, TEST))
    assert np.isfinite(scores.image).all()


@pytest.mark.parametrize("room", slow_after(1, [4, 1]))
def test_paper_scores_of_a_bank_of_one_row_are_not_reweighted(room):
    bank = jnp.asarray(patches(TRAIN)[0, :room], jnp.float32)
    state = PatchcoreBank(bank, jnp.int32(1), jnp.float32(0), None, *PATCHES_AND_NEIGHBORS)
    scores = jax.jit(patchcore(scoring="paper", **OPTIONS).score)(state, None, TEST).image
    expected = cdist(patches(TEST).reshape(48, -1), patches(TRAIN)[0, :1]).reshape(3, 16).max(1)
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_the_coreset_covers_all_patches_within_its_radius():
    method = patchcore(coreset_sampling_ratio=0.25, projection_dim=None, **OPTIONS)
    bank = fit(method, TRAIN)
    all_patches, selected = patches(TRAIN).reshape(96, -1), np.asarray(bank.bank)
    assert selected.shape == (24, 7) and bank.size == 24
    assert cdist(selected, all_patches).min(1).max() < 1e-5  # every row is a patch
    np.testing.assert_allclose(bank.radius, cdist(all_patches, selected).min(1).max(), rtol=1e-4)


def test_a_large_bank_has_room_for_a_multiple_of_128_rows():
    """At most as many as there are patches; its size does not change."""
    for n, k, room in ((160, 2049, 2176), (130, 2050, 2080)):
        bank = fit(patchcore(coreset_sampling_ratio=k / (16 * n), **OPTIONS), feature_maps(2, n))
        assert bank.size == k and bank.bank.shape == (room, 7)


def test_the_bank_is_not_projected():
    bank = fit(patchcore(coreset_sampling_ratio=0.25, projection_dim=2, **OPTIONS), TRAIN)
    assert bank.bank.shape == (24, 7)
    assert cdist(np.asarray(bank.bank), patches(TRAIN).reshape(96, -1)).min(1).max() < 1e-5


def test_a_streamed_bank_that_fits_is_the_collected_bank():
    options = OPTIONS | dict(projection_dim=None)
    collected = fit(patchcore(coreset_sampling_ratio=0.25, **options), TRAIN)
    bank = fit(patchcore(coreset_size=24, **options), TRAIN)
    np.testing.assert_array_equal(bank.bank, collected.bank)
    assert bank.size == 24 and bank.radius == collected.radius


@pytest.mark.parametrize("size", slow_after(1, [20, 1, 3, 1000]))
def test_a_streamed_bank_covers_all_patches_within_its_radius(size):
    """Hence scores are at most the radius above those of a bank of all patches."""
    method = patchcore(coreset_size=size, projection_dim=None, **OPTIONS)
    bank, all_patches = fit(method, TRAIN), patches(TRAIN).reshape(96, -1)
    assert bank.bank.shape == (min(size, 96), 7) and bank.size == min(size, 96)
    assert cdist(np.asarray(bank.bank), all_patches).min(1).max() < 1e-5  # every row is a patch
    assert cdist(all_patches, np.asarray(bank.bank)).min(1).max() <= float(bank.radius) + 1e-5
    scores = jax.jit(method.score)(bank, None, TEST).image
    lowest = cdist(patches(TEST).reshape(48, -1), all_patches).min(1).reshape(3, 16).max(1)
    assert (scores >= lowest - 1e-5).all() and (scores <= lowest + bank.radius + 1e-5).all()


def test_a_streamed_bank_scores_about_as_the_collected_bank():
    train = feature_maps(4, 48)  # 768 patches, of which a stream holds 4 * 48 before it selects
    methods = [patchcore(**OPTIONS | size) for size in (dict(coreset_sampling_ratio=1 / 16), dict(coreset_size=48))]
    collected, streamed = (jax.jit(method.score)(fit(method, train), None, TEST).image for method in methods)
    np.testing.assert_allclose(streamed, collected, rtol=0.15)


def test_update_adds_new_normal_images():
    method = patchcore(coreset_sampling_ratio=1.0, **OPTIONS)
    old, new = fit(method, TRAIN), fit(method, TEST)
    both = jit_update(jax.random.key(0), old, new)
    all_patches = np.concatenate([old.bank, new.bank])
    np.testing.assert_array_equal(both.bank, all_patches)
    assert both.size == 144 and both.radius == 0
    scores = jax.jit(method.score)(both, None, TEST)
    np.testing.assert_allclose(scores.image, 0, atol=1e-6)  # now that they are normal


def test_update_thins_to_a_size():
    method = patchcore(coreset_sampling_ratio=0.5, projection_dim=None, **OPTIONS)
    old, new = fit(method, TRAIN), fit(method, TEST)
    thinned = jit_update(jax.random.key(0), old, new, size=30, projection_dim=None)
    assert thinned.bank.shape == (30, 7) and thinned.size == 30
    all_patches = np.concatenate([patches(TRAIN).reshape(96, -1), patches(TEST).reshape(48, -1)])
    assert cdist(all_patches, np.asarray(thinned.bank)).min(1).max() <= float(thinned.radius) * 1.0001


def test_update_skips_the_empty_rows_of_a_bank():
    rows = jnp.arange(8.0).reshape(4, 2)
    old = PatchcoreBank(rows, jnp.int32(2), jnp.float32(1), None, *PATCHES_AND_NEIGHBORS)
    new = PatchcoreBank(rows + 100, jnp.int32(3), jnp.float32(2), None, *PATCHES_AND_NEIGHBORS)
    both = jit_update(jax.random.key(0), old, new)
    assert both.size == 5
    np.testing.assert_array_equal(both.bank[:5], np.concatenate([rows[:2], rows[:3] + 100]))


def test_update_of_an_ensemble_is_that_of_its_members():
    rows = jnp.arange(8.0).reshape(4, 2)
    banks = tuple(PatchcoreBank(rows + i, jnp.int32(4), jnp.float32(0), None, *PATCHES_AND_NEIGHBORS) for i in range(2))
    both = jit_update(jax.random.key(0), banks, banks)
    assert [int(member.size) for member in both] == [8, 8]
    np.testing.assert_array_equal(both[1].bank, np.concatenate([rows + 1, rows + 1]))


@pytest.mark.parametrize("size", [0, 9])
def test_update_to_an_impossible_size(size):
    bank = PatchcoreBank(jnp.ones((4, 2)), jnp.int32(4), jnp.float32(0), None, *PATCHES_AND_NEIGHBORS)
    with pytest.raises(ValueError, match=rf"size .*1\.\.8.* got {size}"):
        update(jax.random.key(0), bank, bank, size=size)


def test_update_of_another_width():
    a, b = (PatchcoreBank(jnp.ones((4, c)), jnp.int32(4), jnp.float32(0), None, *PATCHES_AND_NEIGHBORS) for c in (2, 3))
    with pytest.raises(ValueError, match="one width, got 2 and 3"):
        update(jax.random.key(0), a, b)


@pytest.mark.parametrize("coreset", slow_after(1, [{"coreset_sampling_ratio": 0.25}, {"coreset_size": 5}]))
def test_an_ensemble_averages_scores_in_units_of_the_spread_of_the_bank(coreset):
    options = OPTIONS | coreset
    names = ("pdn_small", "resnet18")
    ensemble = patchcore(**options | dict(backbone=names))
    members = [patchcore(**options | dict(backbone=name)) for name in names]
    train, test = (TRAIN, feature_maps(2, 6, (5, 2))), (TEST, feature_maps(3, 3, (5, 2)))
    n = 6
    batch = Batch(train, jnp.ones(n, bool), jnp.zeros(n, jnp.int32), None, jnp.arange(n, dtype=jnp.int32))
    key, frozen = jax.random.key(0), (None, None)
    stage = ensemble.stages[0]
    state, _ = stage.update(key, stage.init(key, None, frozen, train), frozen, batch)
    state = jax.jit(lambda s: stage.finalize(key, s, frozen))(state)
    scores = jax.jit(ensemble.score)(state, frozen, test)
    parts = [jax.jit(m.score)(s, None, x) for m, s, x in zip(members, state, test, strict=True)]
    banks = [np.asarray(s.bank[: int(s.size)], np.float64) for s in state]
    spread = [np.sqrt(((bank - bank.mean(0)) ** 2).sum(1).mean()) for bank in banks]
    for field in ("image", "pixel"):
        expected = np.mean([getattr(p, field) / s for p, s in zip(parts, spread, strict=True)], 0)
        np.testing.assert_allclose(getattr(scores, field), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("hyperparameter", "message"),
    [
        ({"coreset_sampling_ratio": 0.0}, r"coreset_sampling_ratio must be in \(0, 1\], got 0.0"),
        ({"coreset_sampling_ratio": 1.5}, r"coreset_sampling_ratio must be in \(0, 1\], got 1.5"),
        ({"coreset_size": 0}, "coreset_size must be 1 or more, or None for a share of the patches, got 0"),
        ({"patch_size": 0}, "patch_size must be 1 or more, got 0"),
        ({"num_neighbors": 0}, "num_neighbors must be 1 or more, got 0"),
        ({"scoring": "paper", "reweight_neighbors": 1}, r"reweight_neighbors must be 2 or more .* got 1"),
        ({"projection_dim": 0}, "projection_dim must be 1 or more, or None for no projection, got 0"),
        ({"scoring": "best"}, 'scoring must be "official" or "paper", got "best"'),
        ({"backbone": ()}, "at least one backbone, got an empty tuple"),
        ({"backbone": "resnet19"}, "resnet19"),
        ({"layers": ("layer9",)}, "layer9"),
    ],
)
def test_bad_hyperparameters(hyperparameter, message):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(patchcore)(**OPTIONS | hyperparameter)


def test_only_distances_to_the_nearest_of_all_patches_are_monotone():
    """A coreset of more images may lie farther from a patch, and other neighbors or weights may raise a score."""
    assert isinstance(patchcore(coreset_sampling_ratio=1.0), MonotoneMethod)
    for options in ({}, {"num_neighbors": 2}, {"scoring": "paper"}, {"coreset_size": 9}):
        ratio = 1.0 if options else 0.5
        assert not isinstance(patchcore(coreset_sampling_ratio=ratio, **options), MonotoneMethod)
