"""Images are decoded and embedded once, and cached in the host's memory or on the devices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxad
from jaxad.driver import embedding
from jaxad.driver.embedding import EmbeddingCache, Storage
from jaxad.driver.fit import fit, fit_classes
from jaxad.driver.scoring import embed_all, score_all, score_classes
from tests.driver.toy import (
    CLASSES,
    DATA,
    FROZEN,
    KEY,
    LONG,
    TOY,
    N,
    assert_equal,
    execution,
    mean_color,
    photographs,
)
from tests.examples import slow_after


def test_images_are_decoded_once_for_all_stages_and_epochs(decoded):
    fit(TOY, FROZEN, DATA, KEY)
    assert sorted(decoded) == list(range(N))


def test_images_are_decoded_once_for_all_methods_of_a_cache(decoded):
    cache = EmbeddingCache()
    state = fit(TOY, FROZEN, DATA, KEY, execution(cache=cache)).state
    fit(LONG, FROZEN, DATA.subset(range(N)), KEY, execution(cache=cache))
    score_all(TOY, state, FROZEN, DATA, execution(cache=cache))
    assert sorted(decoded) == list(range(N))
    score_all(TOY, state, FROZEN, photographs(2), execution(cache=cache))
    assert sorted(decoded) == sorted([*range(N), 0, 1])


@pytest.mark.parametrize("place", ["host", "device"])
@pytest.mark.parametrize("axes", slow_after(1, [(None,), ((3, 2),)]))
def test_parts_of_a_data_set_share_its_images(place, axes, decoded):
    mesh = None if axes is None else jaxad.make_mesh(shape=axes)
    parts = [DATA, DATA.subset(range(9)), DATA.subset(range(5, N)), DATA.subset([20, 3, 4])]
    options = execution(mesh=mesh, cache=EmbeddingCache(Storage(place)))
    embed_all(TOY.embed, FROZEN, [DATA], options)
    assert sorted(decoded) == list(range(N))
    states = fit_classes(TOY, FROZEN, parts, KEY, options).state
    shared = score_all(TOY, jax.tree.map(lambda leaf: leaf[3], states), FROZEN, parts[3], options).image
    assert len(decoded) == N
    alone = fit_classes(TOY, FROZEN, parts, KEY, execution(mesh=mesh)).state
    assert_equal(states, alone)
    expected = score_all(TOY, jax.tree.map(lambda leaf: leaf[3], alone), FROZEN, DATA, execution(mesh=mesh))
    np.testing.assert_allclose(shared, expected.image[[20, 3, 4]], rtol=1e-6)


def test_images_that_do_not_fit_into_the_cache_are_embedded_anew(decoded, monkeypatch):
    monkeypatch.setattr(embedding, "CACHE_BYTES", 10)
    options, part = execution(cache=EmbeddingCache()), DATA.subset(range(9))
    embed_all(TOY.embed, FROZEN, [DATA], options)
    assert not decoded
    assert_equal(fit(TOY, FROZEN, part, KEY, options).state, fit(TOY, FROZEN, part, KEY).state)


def test_a_cache_distinguishes_weights():
    cache = EmbeddingCache()
    fit(TOY, FROZEN, DATA, KEY, execution(cache=cache))
    other = jnp.float32(0.5)
    assert_equal(fit(TOY, other, DATA, KEY, execution(cache=cache)).state, fit(TOY, other, DATA, KEY).state)
    assert [part.frozen for part in cache.values()] == [FROZEN, other]  # referenced, so that their ids stay unique


@pytest.mark.parametrize("axes", slow_after(1, [((3, 2),), (None,)]))
def test_embeddings_cached_on_the_device_are_those_of_the_host(axes, decoded):
    mesh = None if axes is None else jaxad.make_mesh(shape=axes)
    cache = EmbeddingCache(Storage("device"))
    on_device = fit_classes(TOY, FROZEN, CLASSES, KEY, execution(mesh=mesh, cache=cache)).state
    assert len(decoded) == 21 + 9 + 3
    assert all(
        isinstance(leaf, jax.Array) for part in cache.values() for leaf in jax.tree.leaves(part.get(np.arange(2)))
    )
    assert_equal(on_device, fit_classes(TOY, FROZEN, CLASSES, KEY, execution(mesh=mesh)).state)
    for c, index, scores in score_classes(TOY, on_device, FROZEN, CLASSES, execution(mesh=mesh, cache=cache)):
        state = jax.tree.map(lambda leaf, c=c: leaf[c], on_device)
        np.testing.assert_allclose(scores.image, score_all(TOY, state, FROZEN, CLASSES[c]).image[index], rtol=1e-5)


@pytest.mark.parametrize("place", ["host", "device"])
def test_embeddings_cached_in_bfloat16_are_rounded_from_the_first_epoch_on(place):
    def rounded(frozen, image):
        return jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), mean_color(frozen, image))

    cache = EmbeddingCache(Storage(place, "bfloat16"))
    half = fit(TOY, FROZEN, DATA, KEY, execution(cache=cache)).state
    assert_equal(half, fit(TOY._replace(embed=rounded), FROZEN, DATA, KEY).state)
    assert next(iter(cache.values())).room == (N * 3 * 2, N * 3 * 2)
    assert next(iter(cache.values())).get(np.arange(2))["color"].dtype == jnp.bfloat16


@pytest.mark.parametrize("storage", [Storage("disk"), Storage(dtype="int8")])  # pyright: ignore[reportArgumentType]
def test_a_cache_in_another_place_or_type_is_refused(storage):
    with pytest.raises(ValueError, match=r'^cache(_dtype)? must be "\w+" or "\w+", got "\w+"$'):
        EmbeddingCache(storage)


def test_embeddings_that_do_not_fit_are_computed_anew(decoded, monkeypatch):
    cached = fit(TOY, FROZEN, DATA, KEY).state
    decoded.clear()
    monkeypatch.setattr(embedding, "CACHE_BYTES", 10)
    assert_equal(fit(TOY, FROZEN, DATA, KEY).state, cached)
    assert N + 30 < len(decoded) <= N + 3 * 20  # an image that a chunk holds twice is decoded once


def test_classes_are_decoded_once(decoded):
    cache = EmbeddingCache()
    state = fit_classes(TOY, FROZEN, CLASSES, KEY, execution(cache=cache)).state
    list(score_classes(TOY, state, FROZEN, CLASSES, execution(cache=cache)))
    assert len(decoded) == 21 + 9 + 3
    fit_classes(TOY, FROZEN, CLASSES[1:], KEY, execution(cache=cache))
    assert len(decoded) == 21 + 9 + 3
