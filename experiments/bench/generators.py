"""How many synthetic anomalies per second: a batch at a time in jaxad, one image at a time in numpy and Pillow.

    python -m experiments.bench.generators

Both sides make the same kind of anomaly at 256 px from the same rendered images, jaxad on all cores or a GPU, the other
side in one process. Rates are medians over the calls of one run, without compile time. Entries of other devices and
generators in bench_generators.json are kept. `--sheet` draws the samples in docs/generators.png instead. `--smoke` is
the small variant for the tests.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax

from experiments.bench import plain_generators
from experiments.bench.plain_generators import STEPS, discriminator
from experiments.command import RESULTS, machine, origin, start
from jaxad.data.demo import render
from jaxad.files import read_json, replacing, write_json
from jaxad.methods.glass import MIN_DISTANCE, STEP_LENGTH, STEPS_PER_PROJECTION
from jaxad.synthesis import anomaly, cutpaste, nsa, perlin, poisson, texture
from jaxad.synthesis.ascent import ascend, project_to_shell

matplotlib.use("agg")
import matplotlib.pyplot as plt

Generator = Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
"""(key, image, another image) -> an image with an anomaly, and its mask."""


@dataclass
class Options:
    """Measure the generators of anomalies."""

    size: int = 256
    batch: int = 16
    seconds: float = 4.0
    """Time for either side of every generator."""
    generators: tuple[str, ...] = ()
    """By name; none: all of them."""
    sheet: Path | None = None
    """The file of a picture of samples to draw; None: generators are measured."""
    results: Path = RESULTS
    smoke: bool = False
    """Small images, few calls."""


MASKS = ("Perlin mask", "fractal mask")
"""Generators of masks, which do not change the image."""
ON_OBJECTS = ("tiles (MemSeg)", "NSA, on the object")
"""Generators that keep to an object; images of a material have none."""


def generators(size: tuple[int, int]) -> dict[str, Generator]:
    """The generators of images of that size, by name. DRAEM's texture is the other image."""

    def cloned(key: jax.Array, image: jax.Array, other: jax.Array) -> anomaly.Anomalous:
        inside = jnp.pad(jnp.ones([n - 2 for n in size], bool), 1)
        mask = perlin.perlin_mask(key, size, (1, 3), 0.3) & inside
        moved = jnp.roll(other, [n // 3 for n in size], (0, 1))
        return jnp.clip(poisson.seamless_clone(image, moved, mask), 0, 1), mask

    def textured(key: jax.Array, image: jax.Array, other: jax.Array) -> anomaly.Anomalous:
        change_key, draw_key = jax.random.split(key)
        return anomaly.add_texture(draw_key, image, texture.change_texture(change_key, other, texture.BOLD_CHANGES))

    def tiles(key: jax.Array, image: jax.Array, other: jax.Array) -> anomaly.Anomalous:
        del other
        order_key, draw_key = jax.random.split(key)
        tiled, foreground = anomaly.shuffled_tiles(order_key, image), anomaly.foreground(image)
        return anomaly.add_texture(draw_key, image, tiled, opacity=(0.15, 1.0), foreground=foreground)

    def natural_on_object(key: jax.Array, image: jax.Array, other: jax.Array) -> anomaly.Anomalous:
        objects = (anomaly.foreground(image), anomaly.foreground(other))
        return nsa.natural_anomaly(key, image, other, foregrounds=objects, least_object=0.7)

    return {
        "CutPaste": lambda key, image, other: cutpaste.cutpaste(key, image),
        "CutPaste, rotated": lambda key, image, other: cutpaste.cutpaste(key, image, degrees=45.0),
        "scar": lambda key, image, other: cutpaste.scar(key, image),
        "Perlin mask": lambda key, image, other: (image, perlin.perlin_mask(key, size)),
        "fractal mask": lambda key, image, other: (image, perlin.perlin_mask(key, size, octaves=4)),
        "texture (DRAEM)": textured,
        "tiles (MemSeg)": tiles,
        "confetti": lambda key, image, other: anomaly.confetti(key, image),
        "Poisson cloning": cloned,
        "NSA": lambda key, image, other: nsa.natural_anomaly(key, image, other),
        "NSA, mixed": lambda key, image, other: nsa.natural_anomaly(key, image, other, mixed=True),
        "NSA, on the object": natural_on_object,
    }


def climb(x: jax.Array, moved: jax.Array) -> jax.Array:
    """GLASS's ascent of features (b h w c) that start near the normal ones x, with its own constants."""
    first, second = discriminator()

    def loss(features: jax.Array, _: None) -> tuple[jax.Array, None]:
        logit = jax.nn.leaky_relu(features @ first, 0.2) @ second
        return optax.sigmoid_binary_cross_entropy(logit, jnp.ones(())).sum(), None

    def project(features: jax.Array) -> jax.Array:
        return project_to_shell(features, x, jnp.float32(MIN_DISTANCE))

    return ascend(loss, moved, None, STEPS, STEP_LENGTH, STEPS_PER_PROJECTION, project)[0]


def ascent(key: jax.Array, image: jax.Array, other: jax.Array) -> tuple[jax.Array, jax.Array]:
    """GLASS's anomalous features of patches at every eighth pixel, and the normal features."""
    del other
    normal_key, noise_key = jax.random.split(key)
    x = jax.random.normal(normal_key, (1, image.shape[0] // 8, image.shape[1] // 8, len(discriminator()[0])))
    return climb(x, x + 0.015 * jax.random.normal(noise_key, x.shape)), x


NOT_IMAGES: dict[str, Generator] = {
    "CutPaste, 3-way": lambda key, image, other: cutpaste.three_way(key, image),
    "feature ascent (GLASS)": ascent,
}
"""Generators whose results are not a single image; they are measured, but not drawn."""


def chosen_generators(options: Options) -> dict[str, Generator]:
    """The generators that the options ask for, by name.

    Raises:
        ValueError: There is no generator of such a name.
    """
    known = generators((options.size, options.size)) | (NOT_IMAGES if options.sheet is None else {})
    unknown = set(options.generators).difference(known)
    if unknown:
        raise ValueError(f"generators must be of {', '.join(known)}; got {', '.join(sorted(unknown))}")
    return {name: known[name] for name in options.generators or known}


def rates(call: Callable[[int], Any], images: int, seconds: float) -> list[float]:
    """Images per second of every call, for a time and at least two calls, after a first one that does not count."""
    call(0)
    result, end = [], time.perf_counter() + seconds
    while len(result) < 2 or time.perf_counter() < end:
        started = time.perf_counter()
        call(len(result))
        result.append(images / (time.perf_counter() - started))
    return result


def measure(options: Options) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measures every generator on both sides; yields its name and its row."""
    names = ("fabric", "tablet")
    images = np.stack([render(names[i % 2], i, size=options.size)[0] for i in range(options.batch)])
    others = np.stack([render(names[i % 2], i + 100, size=options.size)[0] for i in range(options.batch)])
    float_images, float_others = (jnp.asarray(x, jnp.float32) / 255 for x in (images, others))
    for name, generator in chosen_generators(options).items():
        program, started = jax.jit(jax.vmap(generator)), time.perf_counter()
        keys = jax.random.split(jax.random.key(0), (64, options.batch))
        jax.block_until_ready(program(keys[0], float_images, float_others))
        row: dict[str, Any] = {"compile_seconds": time.perf_counter() - started}

        def whole_batch(i: int, program: Any = program, keys: Any = keys) -> None:
            jax.block_until_ready(program(keys[i % len(keys)], float_images, float_others))

        row["images_a_second"] = float(np.median(rates(whole_batch, options.batch, options.seconds)))
        plain = plain_generators.GENERATORS.get(name)
        if plain is not None:
            random = np.random.default_rng(0)

            def image_by_image(i: int, plain: Any = plain, random: Any = random) -> None:
                for image, other in zip(images, others, strict=True):
                    plain(random, image, other)

            row["numpy_images_a_second"] = float(np.median(rates(image_by_image, options.batch, options.seconds)))
            row["ratio"] = row["images_a_second"] / row["numpy_images_a_second"]
        print(name, row, flush=True)
        yield name, row


def draw(options: Options, path: Path) -> None:
    """Draws the sheet: one row per generator, with four samples and their masks."""
    chosen, names = chosen_generators(options), ("fabric", "tablet", "gear", "brushed_metal")
    figure, axes = plt.subplots(len(chosen), 8, figsize=(12, 1.55 * len(chosen)), squeeze=False)
    for row, (title, generator) in zip(axes, chosen.items(), strict=True):
        program = jax.jit(generator)
        for i, name in enumerate(names):
            image, other = (jnp.asarray(render(name, k, size=options.size)[0], jnp.float32) / 255 for k in (0, 1))
            if "DRAEM" in title:
                other = texture.texture(jax.random.key(i), (options.size, options.size))
            for number in range(64):  # until an anomaly is large enough to be seen
                sample, mask = program(jax.random.key(64 * i + number), image, other)
                if float(jnp.mean(jnp.asarray(mask, jnp.float32))) > 0.004:
                    break
            picture = jnp.where(mask[..., None], 1, sample) if title in MASKS else sample
            row[2 * i].imshow(np.asarray(picture))
            row[2 * i + 1].imshow(np.asarray(mask, np.float32), cmap="gray", vmin=0, vmax=1)
        row[0].set_ylabel(title, fontsize=9)
        for axis in row:
            axis.set(xticks=[], yticks=[])
    figure.tight_layout(pad=0.3)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=75, format="png")
    plt.close(figure)


def main(options: Options) -> None:
    """Draws the sheet, or measures and writes results/bench_generators.json."""
    if options.smoke:
        options.size, options.batch, options.seconds = 64, 2, 0.0
    if options.sheet is not None:
        draw(options, options.sheet)
        return
    record = {"experiment": "bench_generators", "size": options.size}
    path, device = options.results / "bench_generators.json", machine()["device"]
    old = read_json(path) if path.exists() else {}
    devices = old["devices"] if record.items() <= old.items() else {}
    for name, row in measure(options):
        devices.setdefault(device, {})[name] = row | {"batch": options.batch} | origin()
        write_json(path, record | {"devices": devices})


if __name__ == "__main__":
    start(main, Options)
