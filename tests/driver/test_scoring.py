"""Scores come batch by batch."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxad.base import Scores
from jaxad.driver.fit import fit, fit_classes
from jaxad.driver.mesh import make_mesh
from jaxad.driver.scoring import score, score_all, score_classes
from tests.driver.toy import CLASSES, DATA, FROZEN, KEY, TOY, N, ToyModel, execution, mean_color, photographs


def test_scores_come_batch_by_batch(decoded):
    model = fit(TOY, FROZEN, DATA, KEY).state
    decoded.clear()
    calls = []
    stream = score(TOY, model, FROZEN, DATA, execution(batch_size=4, progress=lambda *call: calls.append(call)))
    first, scores = next(stream)
    assert list(first) == [0, 1, 2, 3] and isinstance(scores.image, np.ndarray) and len(decoded) <= 8
    parts = [(first, scores), *stream]
    assert np.concatenate([part for part, _ in parts]).tolist() == list(range(N)) and len(parts[-1][0]) == 1
    image = np.concatenate([s.image for _, s in parts])
    color = DATA.images(range(N)).mean((1, 2)) / 255 * 2
    np.testing.assert_allclose(image, (color @ np.asarray(model.weight) - 1) ** 2, rtol=1e-4, atol=1e-5)
    assert calls[-1] == ("score", N, N) and len(calls) == 7
    np.testing.assert_allclose(score_all(TOY, model, FROZEN, DATA, execution(batch_size=N)).image, image, rtol=1e-5)


@pytest.mark.parametrize(("devices", "sizes"), [(1, {1, 2, 4, 6}), (2, {1, 2, 3})])
def test_few_images_take_a_small_program(devices, sizes):
    """Which sizes are compiled does not depend on the number of images, and a batch is never larger than needed."""
    compiled = []

    def embed(frozen, image):
        compiled.append(image.shape[0])
        return mean_color(frozen, image)

    method = TOY._replace(embed=embed)
    options = execution(batch_size=6, mesh=make_mesh("data", shape=(2,)) if devices > 1 else None)
    state, expected = ToyModel(jnp.arange(3.0), jnp.zeros(2)), None
    for n in (N, 6, 5, 4, 3, 2, 1):
        before = len(compiled)
        scores = score_all(method, state, FROZEN, DATA.subset(range(n)), options).image
        expected = scores if expected is None else expected
        np.testing.assert_allclose(scores, expected[:n], rtol=1e-5)
        assert set(compiled[before:]) <= {min(size for size in sizes if devices * size >= min(n, 6))}
    assert set(compiled) == sizes
    before = len(compiled)
    list(score(method, state, FROZEN, DATA.subset([0]), options, whole_batches=True))
    assert len(compiled) == before


def test_scores_that_are_not_finite_name_the_image():
    data = photographs(3)
    with pytest.raises(ValueError, match=r"scores must be finite, got nan for array\[0\]"):
        score_all(TOY, ToyModel(jnp.full(3, jnp.nan), jnp.zeros(2)), FROZEN, data)

    def overflow(state, frozen, x):
        image = jnp.arange(len(x["color"]), dtype=jnp.float32)
        return Scores(image, jnp.zeros((len(image), 2, 2)).at[:, 1, 0].set(jnp.where(image == 1, jnp.inf, 0)))

    with pytest.raises(ValueError, match=r"scores must be finite, got inf for array\[1\]"):
        score_all(TOY._replace(score=overflow), ToyModel(jnp.zeros(3), jnp.zeros(2)), FROZEN, data)


def test_an_empty_class_is_scored_as_nothing():
    state = fit_classes(TOY, FROZEN, CLASSES, KEY).state
    some = [CLASSES[0], CLASSES[1].subset([]), CLASSES[2]]
    assert {c for c, _, _ in score_classes(TOY, state, FROZEN, some)} == {0, 2}
    assert list(score_classes(TOY, state, FROZEN, [CLASSES[0].subset([])] * 3)) == []
