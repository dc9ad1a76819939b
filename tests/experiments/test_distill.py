"""Distillation: the loss falls, a killed run resumes, and the weights can be loaded."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments.distill import backbone as distill_backbone
from experiments.distill import teacher as distill_teacher
from jaxad.backbones import backbone, features, load


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")  # optax's AdamW counts steps in integers
def test_distilled_backbone_learns_resumes_and_loads(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    (tmp_path / "photographs").mkdir()
    for i in range(4):
        pixels = random.integers(0, 256, (6, 6, 3), np.uint8)
        Image.fromarray(pixels).resize((80, 80)).save(tmp_path / "photographs" / f"{i}.png")
    options = distill_backbone.Options(
        tmp_path / "photographs",
        teacher="resnet50",
        out=tmp_path / "pdn_small.safetensors",
        results=tmp_path / "distill_backbone.json",
        workdir=tmp_path / "work",
        crops=32,
        size=64,
        batch_size=8,
        epochs=3,
    )
    distill_backbone.main(options)
    result = json.loads(options.results.read_text())
    assert result["loss_curve"]["train"][-1] < result["loss_curve"]["train"][0]
    assert result["resumed_from_epoch"] == 0 and result["file_bytes"] <= 6 << 20
    frozen = load("pdn_small", options.out)
    image = random.integers(0, 256, (1, 64, 64, 3), np.uint8)
    maps = jax.jit(features("pdn_small", ("layer3",)))(frozen, image)["layer3"]
    assert maps.shape == (1, 8, 8, 384) and bool(np.isfinite(maps).all())
    distill_backbone.main(options)
    assert json.loads(options.results.read_text())["resumed_from_epoch"] == 3


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_loss_of_a_teacher_is_the_sum_of_three_terms() -> None:
    random = np.random.default_rng(0)
    description, decoded, target = (random.normal(0, 0.5, (12, width)).astype(np.float32) for width in (6, 8, 8))
    description[:, 0] = 1.0  # a constant channel correlates with none
    near = description + random.normal(0, 0.3, description.shape).astype(np.float32)
    terms = distill_teacher.terms(*map(jnp.asarray, (description, near, decoded, target)))
    a, n, d, t = (leaf.astype(np.float64) for leaf in (description, near, decoded, target))
    distillation = np.linalg.norm(d - t, axis=1) ** 2
    nearest = [min(np.linalg.norm(a[i] - a[i - 1]), np.linalg.norm(n[i] - a[i - 1])) ** 2 for i in range(12)]
    metric = np.maximum(0, 1 + np.linalg.norm(a - n, axis=1) ** 2 - nearest)
    assert 0 < np.count_nonzero(metric) < 12
    correlation = np.corrcoef(a[:, 1:].T)
    compact = sum(correlation[i, j] ** 2 for i in range(5) for j in range(5) if i != j) / 6
    for term, expected in zip(terms, (distillation, metric, compact), strict=True):
        np.testing.assert_allclose(term, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(distill_teacher.total(*terms), (distillation + metric).mean() + compact, rtol=1e-5)


@pytest.mark.slow
def test_distilled_teacher_of_patches_loads(tmp_path: Path) -> None:
    out = tmp_path / "patch17.safetensors"
    options = distill_teacher.Options(
        patch=17, epochs=1, batch_size=4, out=out, results=tmp_path, workdir=tmp_path / "work", smoke=True
    )
    distill_teacher.main(options)
    result = json.loads((tmp_path / "distill_patch17.json").read_text())
    assert result["patches"] == 40 and np.isfinite(result["variance_explained"])
    maps = backbone("patch17").apply(load("patch17", out), jnp.zeros((1, 24, 24, 3)), ("stride8",))
    assert maps["stride8"].shape == (1, 3, 3, 128) and np.isfinite(maps["stride8"]).all()


def test_distillation_of_a_teacher_needs_photographs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no images: give a folder"):
        distill_teacher.crops(distill_teacher.Options(images=tmp_path))
