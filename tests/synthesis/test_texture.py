"""Changes of textures against Pillow; sources of anomalies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from jaxad.synthesis import texture
from tests.synthesis.inputs import noise


def test_lookup_tables_are_pillows():
    rng = np.random.default_rng(0)
    levels = rng.integers(40, 200, (32, 32, 3))
    levels[..., 1] = rng.integers(0, 256, (32, 32)) ** 2 // 256
    photograph = Image.fromarray(levels.astype(np.uint8))
    count = texture.histogram(jnp.asarray(levels))
    np.testing.assert_array_equal(count, [np.bincount(levels[..., c].ravel(), minlength=256) for c in range(3)])
    tables = np.asarray(texture.lookup_tables(jax.random.key(0), count))
    mapped = dict(zip(texture.BOLD, tables[:, np.arange(3), levels], strict=False))
    mapped |= {
        f"autocontrast {percent}": np.asarray(texture.autocontrast(count, jnp.float32(percent)))[np.arange(3), levels]
        for percent in (0, 7, 60)
    }
    for name, expected in (
        ("autocontrast 0", ImageOps.autocontrast(photograph)),
        ("autocontrast 7", ImageOps.autocontrast(photograph, 7)),
        ("autocontrast 60", photograph),  # no pixel is left
        ("equalize", ImageOps.equalize(photograph)),
        ("invert", ImageOps.invert(photograph)),
    ):
        np.testing.assert_allclose(np.clip(255 * mapped[name], 0, 255), expected, atol=1.01, err_msg=name)
    gamma, brightness = (255 * mapped[name] for name in ("gamma", "brightness"))
    assert ((levels / 255) ** 2 * 255 - 0.1 <= gamma).all() and (gamma <= (levels / 255) ** 0.5 * 255 + 0.1).all()
    assert (0.8 * levels - 30.1 <= brightness).all() and (brightness <= 1.2 * levels + 30.1).all()
    assert (mapped["posterize"] <= levels / 255 + 1e-6).all()
    assert tables.min() >= 0 and tables.max() <= 1


@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 2.0])
def test_sharpness_is_pillows(factor):
    levels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    expected = np.asarray(ImageEnhance.Sharpness(Image.fromarray(levels)).enhance(factor))
    sharpened = 255 * texture.sharpen(jnp.asarray(levels, jnp.float32) / 255, jnp.float32(factor))
    np.testing.assert_allclose(sharpened[1:-1, 1:-1], expected[1:-1, 1:-1], atol=2)


@pytest.mark.parametrize("changes", [texture.BOLD_CHANGES, texture.GENTLE_CHANGES], ids=["bold", "gentle"])
def test_every_change_changes_a_texture_and_stays_in_range(changes):
    image = noise(3) * 0.6 + 0.2
    change = jax.jit(changes.change)
    for number in range(changes.count):
        outputs = np.stack([change(jax.random.key(i), image, jnp.int32(number)) for i in range(8)])
        assert outputs.min() >= 0 and outputs.max() <= 1, number
        assert (np.abs(outputs - np.asarray(image)).max((1, 2, 3)) > 0.01).sum() >= 4, number


def test_gentle_changes_are_pillows():
    levels = np.random.default_rng(0).integers(20, 200, (20, 30, 3), np.uint8)
    photograph, change = Image.fromarray(levels), jax.jit(texture.gentle_change)
    for name, expected in {
        "mirror": ImageOps.mirror(photograph),
        "flip": ImageOps.flip(photograph),
        "gray": photograph.convert("L").convert("RGB"),
        "autocontrast": ImageOps.autocontrast(photograph),
        "equalize": ImageOps.equalize(photograph),
    }.items():
        number = jnp.int32(texture.GENTLE.index(name))
        output = 255 * change(jax.random.key(0), jnp.asarray(levels, jnp.float32) / 255, number)
        np.testing.assert_allclose(output, np.asarray(expected, np.float32), atol=1.001, err_msg=name)


@pytest.mark.slow
def test_a_third_of_gently_changed_textures_is_gray():
    keys = jax.random.split(jax.random.key(0), 300)
    outputs = jax.vmap(lambda key: texture.change_texture(key, noise(3), texture.GENTLE_CHANGES))(keys)
    gray = np.asarray(jnp.ptp(outputs, -1).max((1, 2)) < 1e-5).mean()
    assert abs(gray - 1 / 3) < 0.09


def test_a_source_is_one_of_the_textures():
    textures = np.random.default_rng(0).integers(0, 256, (5, 24, 32, 3), np.uint8)
    source = texture.source(jax.random.key(0), (24, 32), jnp.asarray(textures), None)
    assert (np.abs(np.asarray(source) - textures / 255).max((1, 2, 3)) < 1e-6).sum() == 1
    assert texture.source(jax.random.key(0), (48, 40), jnp.asarray(textures), None).shape == (48, 40, 3)
