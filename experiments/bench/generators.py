"""How many synthetic anomalies a second: a batch at a time in jaxad, one image at a time in numpy, scipy and Pillow.

    python experiments/bench_generators.py

Both sides make the same kind of anomaly at 256 px from the same rendered images, jaxad on all cores or a GPU, the other
in one process; medians of calls of this one run, compile time apart. What bench_generators.json holds of other devices
and generators stays. It also draws the sheet of samples in docs/generators.png (`--sheet`). `--smoke` is the small
variant that the tests run.
"""

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import scipy.fft
import scipy.sparse
import scipy.sparse.linalg
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from scipy import ndimage

from command import origin, start
from jaxad.files import read_json, replacing, write_json
from jaxad.data.demo import render
from jaxad.methods.glass import APART, EVERY, STEP
from jaxad.synthesis import texture
from jaxad.synthesis import poisson
from jaxad.synthesis import perlin
from jaxad.synthesis import nsa
from jaxad.synthesis import cutpaste
from jaxad.synthesis import anomaly
from jaxad.synthesis.ascent import ascend, into_shell

matplotlib.use("agg")
import matplotlib.pyplot as plt

Made = tuple[np.ndarray, np.ndarray]
"""An image, and its anomaly."""
Generator = Callable[[Any, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
"""Of a key, an image and another one."""
STEPS = 20
"""Up, of GLASS's features."""


@dataclass
class Options:
    """Measure the generators of anomalies."""

    size: int = 256
    batch: int = 16
    seconds: float = 4.0
    """Of every side and generator."""
    generators: tuple[str, ...] = ()
    """By name; none: all of them."""
    sheet: Path | None = None
    """A picture of samples to draw; none: no picture."""
    results: Path = field(default_factory=lambda: Path(__file__).parent / "results")
    smoke: bool = False
    """Small images, few calls."""


def jitter(random: np.random.Generator, piece: Image.Image) -> Image.Image:
    """Another brightness, contrast, saturation and hue, by a tenth."""
    for kind in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        piece = kind(piece).enhance(random.uniform(0.9, 1.1))
    hue, *rest = piece.convert("HSV").split()
    hue = Image.fromarray(np.asarray(hue) + np.uint8(random.integers(-25, 26) % 256))
    return Image.merge("HSV", (hue, *rest)).convert("RGB")


def pasted(random: np.random.Generator, image: np.ndarray, h: int, w: int, degrees: float) -> Made:
    """A rectangle of the image elsewhere; the corners of a rotated one may lie outside."""
    size, whole = image.shape[0], Image.fromarray(image)
    y, x = (int(random.integers(0, size - n + 1)) for n in (h, w))
    piece = jitter(random, whole.crop((x, y, x + w, y + h)))
    mask = Image.new("L", piece.size, 255)
    if degrees:
        piece, mask = (part.rotate(degrees, expand=True) for part in (piece, mask))
    at: Any = tuple(
        int(random.integers(0, size - n + 1)) - (m - n) // 2 for n, m in zip((w, h), piece.size, strict=True)
    )
    where = Image.new("L", whole.size)
    where.paste(mask, at)
    whole.paste(piece, at, mask)
    return np.asarray(whole), np.asarray(where) > 0


def plain_cutpaste(random: np.random.Generator, image: np.ndarray, other: np.ndarray, degrees: float = 0.0) -> Made:
    """CutPaste, rotated or not."""
    del other
    n = image.shape[0]
    pixels, ratio = random.uniform(0.02, 0.15) * n**2, random.uniform(0.3, 1) ** random.choice((-1, 1))
    h, w = (min(n, max(1, round((pixels * r) ** 0.5))) for r in (ratio, 1 / ratio))
    return pasted(random, image, h, w, random.uniform(-degrees, degrees))


def plain_rotated(random: np.random.Generator, image: np.ndarray, other: np.ndarray) -> Made:
    """CutPaste of a rotated rectangle."""
    return plain_cutpaste(random, image, other, degrees=45.0)


def plain_scar(random: np.random.Generator, image: np.ndarray, other: np.ndarray) -> Made:
    """A scar."""
    del other
    h, w = (max(1, round(random.uniform(*span) * image.shape[0] / 256)) for span in ((10, 25), (2, 16)))
    return pasted(random, image, h, w, random.uniform(-45, 45))


def plain_lattice(random: np.random.Generator, n: int, cells: np.ndarray) -> np.ndarray:
    """Perlin noise of so many cells, with repeated gradients as in DRAEM's code."""
    angle = 2 * np.pi * random.random(cells + 1)
    gradient = np.stack([np.cos(angle), np.sin(angle)], -1)
    step = n // cells
    y, x = (np.arange(n) * c / n % 1 for c in cells)
    at = np.stack(np.meshgrid(y, x, indexing="ij"), -1)

    def corner(down: int, across: int) -> np.ndarray:
        of = gradient[down : down + cells[0], across : across + cells[1]]
        return (of.repeat(step[0], 0).repeat(step[1], 1) * (at - np.array([down, across]))).sum(-1)

    fade = 6 * at**5 - 15 * at**4 + 10 * at**3
    left, right = (corner(0, b) + fade[..., 0] * (corner(1, b) - corner(0, b)) for b in (0, 1))
    return np.sqrt(2) * (left + fade[..., 1] * (right - left))


def plain_noise(
    random: np.random.Generator, n: int, exponents: tuple[int, int] = (0, 6), octaves: int = 1
) -> np.ndarray:
    """Rotated Perlin noise of a random number of cells."""
    cells = 2 ** random.integers(*exponents, 2)
    noise = sum(0.5**i * plain_lattice(random, n, cells << i) for i in range(octaves))
    noise /= np.linalg.norm(0.5 ** np.arange(octaves))
    turned = Image.fromarray(noise.astype(np.float32)).rotate(random.uniform(-90, 90), Image.Resampling.BILINEAR)
    return np.asarray(turned)


def plain_mask(random: np.random.Generator, image: np.ndarray, other: np.ndarray) -> Made:
    """A shape of Perlin noise alone."""
    del other
    return image, plain_noise(random, image.shape[0]) > 0.5


def plain_fractal(random: np.random.Generator, image: np.ndarray, other: np.ndarray) -> Made:
    """A shape of fractal noise alone."""
    del other
    return image, plain_noise(random, image.shape[0], (0, 3), 4) > 0.5


def plain_textured(random: np.random.Generator, image: np.ndarray, other: np.ndarray) -> Made:
    """DRAEM's."""
    found = Image.fromarray(other)
    changes: list[Callable[[Image.Image], Image.Image]] = [
        lambda x: Image.fromarray((255 * (np.asarray(x) / 255) ** random.uniform(0.5, 2, 3)).astype(np.uint8)),
        lambda x: ImageEnhance.Brightness(x).enhance(random.uniform(0.8, 1.2)),
        lambda x: ImageOps.solarize(x, int(random.integers(32, 128))),
        lambda x: ImageOps.posterize(x, int(random.integers(1, 8))),
        ImageOps.invert,
        ImageOps.autocontrast,
        ImageOps.equalize,
        lambda x: ImageEnhance.Sharpness(x).enhance(random.uniform(0, 2)),
        lambda x: jitter(random, x),
        lambda x: x.rotate(random.uniform(-45, 45), Image.Resampling.BILINEAR),
    ]
    for i in random.choice(len(changes), 3, replace=False):
        found = changes[i](found)
    mask = plain_noise(random, image.shape[0]) > 0.5
    opacity = random.uniform(0.2, 1)
    mixed = (1 - opacity) * image + opacity * np.asarray(found)
    return np.where(mask[..., None], mixed, image).astype(np.uint8), mask


def plain_tiles(random: np.random.Generator, image: np.ndarray, other: np.ndarray) -> Made:
    """MemSeg's, of the image in tiles out of order, on the object (Otsu's threshold)."""
    del other
    n, found = image.shape[0], Image.fromarray(image)
    for flip in (Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.FLIP_LEFT_RIGHT):
        found = found.transpose(flip) if random.random() < 0.5 else found
    found = jitter(random, found.rotate(random.uniform(-45, 45), Image.Resampling.BILINEAR))
    tiles = np.asarray(found).reshape(4, n // 4, 8, n // 8, 3).swapaxes(1, 2).reshape(32, n // 4, n // 8, 3)
    shuffled = tiles[random.permutation(32)].reshape(4, 8, n // 4, n // 8, 3).swapaxes(1, 2).reshape(n, n, 3)
    gray = np.asarray(Image.fromarray(image).convert("L"))
    count = np.bincount(gray.ravel(), minlength=256).astype(float)
    below, total = count.cumsum(), (count * np.arange(256)).cumsum()
    above = below[-1] - below
    between = (total * below[-1] - total[-1] * below) ** 2 / np.maximum(below * above, 1)
    within = gray > between.argmax()
    if np.concatenate([within[0], within[-1], within[:, 0], within[:, -1]]).mean() > 0.5:
        within = ~within
    mask, opacity = (plain_noise(random, n) > 0.5) & within, random.uniform(0.15, 1)
    return np.where(mask[..., None], (1 - opacity) * image + opacity * shuffled, image).astype(np.uint8), mask


def plain_cloned(random: np.random.Generator, image: np.ndarray, other: np.ndarray) -> Made:
    """Poisson's equation within a shape of Perlin noise, by a sparse direct solver."""
    mask = np.pad(plain_noise(random, image.shape[0], (1, 3))[1:-1, 1:-1] > 0.3, 1)
    number = np.cumsum(mask).reshape(mask.shape) - 1
    y, x = np.nonzero(mask)
    if not len(y):
        return image, mask
    moved = np.roll(other, [n // 3 for n in image.shape[:2]], (0, 1)).astype(float)
    matrix, right = scipy.sparse.eye(len(y), format="csc") * 4, np.zeros((len(y), 3))
    for down, across in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        there = y + down, x + across
        right += moved[y, x] - moved[there]
        inside = mask[there]
        right += np.where(inside[:, None], 0, image[there])
        rows = number[y, x][inside]
        columns = number[there][inside]
        matrix = matrix - scipy.sparse.csc_matrix((np.ones(len(rows)), (rows, columns)), matrix.shape)
    made = image.astype(float)
    made[y, x] = scipy.sparse.linalg.splu(matrix).solve(right)
    return np.clip(made, 0, 255).astype(np.uint8), mask


def plain_confetti(random: np.random.Generator, image: np.ndarray, other: np.ndarray) -> Made:
    """Rotated rectangles of one color."""
    del other
    shown, mask = Image.fromarray(image), Image.new("L", image.shape[1::-1])
    draws = ImageDraw.Draw(shown), ImageDraw.Draw(mask)
    for _ in range(random.integers(1, 5)):
        half, middle = random.uniform(8 / 480, 54 / 480, 2) * image.shape[0], random.uniform(0, image.shape[0], 2)
        angle = random.uniform(-np.pi / 4, np.pi / 4)
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        corners = [tuple(middle + turn @ (half * sign)) for sign in ((-1, -1), (-1, 1), (1, 1), (1, -1))]
        color = random.integers(0, 256, 3) if random.random() < 0.5 else np.full(3, random.integers(0, 256))
        draws[0].polygon(corners, fill=tuple(map(int, color)))
        draws[1].polygon(corners, fill=255)
    return np.asarray(shown), np.asarray(mask) > 0


def plain_natural(random: np.random.Generator, image: np.ndarray, other: np.ndarray) -> Made:
    """NSA's, of up to three pieces; every piece is a rectangle, which sine transforms solve."""
    n, made = image.shape[0], image / np.float32(255)
    for i in range(3):
        if i and random.random() < 0.5:
            continue
        half = np.clip((0.03 + random.gamma(2, 0.05, 2)) * n, 0.03 * n, 0.4 * n)
        middle = random.uniform(0.03 * n, 0.97 * n, 2)
        low, high = (np.clip(middle + s * half, 0, n).astype(int) for s in (-1, 1))
        factor = min(np.clip(random.normal(1, 0.5), 0.7, 1.3), 0.4 * n / (high - low).max())
        h, w = np.maximum(((high - low) * factor).astype(int), 3)
        piece = Image.fromarray(other[low[0] : high[0], low[1] : high[1]]).resize((w, h), Image.Resampling.BILINEAR)
        y, x = (int(random.integers(0, n - s + 1)) for s in (h, w))
        target, source = made[y : y + h, x : x + w], np.asarray(piece) / np.float32(255)
        apart = source - target
        right = 4 * apart[1:-1, 1:-1] - apart[:-2, 1:-1] - apart[2:, 1:-1] - apart[1:-1, :-2] - apart[1:-1, 2:]
        values = [(2 - 2 * np.cos(np.pi * np.arange(1, s - 1) / (s - 1))).astype(np.float32) for s in (h, w)]
        scale = values[0][:, None, None] + values[1][None, :, None]
        change: Any = scipy.fft.idstn(scipy.fft.dstn(right, 1, axes=(0, 1)) / scale, 1, axes=(0, 1))
        made[y + 1 : y + h - 1, x + 1 : x + w - 1] = np.clip(target[1:-1, 1:-1] + change, 0, 1)
    difference = np.abs(255 * made - image).mean(-1)
    mask = ndimage.uniform_filter((difference > 1).astype(np.float32), 5, mode="constant") > 0.5
    label = mask / (1 + np.exp(-(ndimage.uniform_filter(difference, 11) - 20) / 6))
    return (255 * made).astype(np.uint8), label


def plain_both(random: np.random.Generator, image: np.ndarray, other: np.ndarray) -> Made:
    """The three classes of the 3-way problem."""
    made = [plain(random, image, other) for plain in (plain_cutpaste, plain_scar)]
    return np.stack([image, *(one for one, _ in made)]), np.stack([mask for _, mask in made])


@functools.cache
def judged() -> tuple[np.ndarray, np.ndarray]:
    """The layers of an untrained discriminator of GLASS, for the channels of a ResNet-18's layers 2 and 3."""
    random = np.random.default_rng(0)
    draws = (random.standard_normal((n, m)) * (2 / (n + m)) ** 0.5 for n, m in ((384, 1024), (1024, 1)))
    first, second = (x.astype(np.float32) for x in draws)
    return first, second


def plain_climb(x: np.ndarray, moved: np.ndarray) -> np.ndarray:
    """GLASS's ascent of features that begin near their normal ones, by the gradient of cross-entropy as a formula."""
    first, second = judged()
    for i in range(STEPS):
        hidden = moved @ first
        slope = np.where(hidden > 0, np.float32(1), np.float32(0.2))
        gradient = (slope * second[:, 0] / (1 + np.exp((hidden * slope) @ second))) @ -first.T
        moved = moved + np.float32(STEP) * gradient / np.linalg.norm(gradient, axis=-1, keepdims=True)
        if (i + 1) % EVERY == 0:
            apart = moved - x
            distance = np.linalg.norm(apart, axis=-1, keepdims=True)
            moved = x + apart * np.clip(distance, APART, 2 * APART) / distance
    return moved


def plain_ascent(random: np.random.Generator, image: np.ndarray, other: np.ndarray) -> Made:
    """GLASS's, of patches at every eighth pixel."""
    del other
    x = random.standard_normal((image.shape[0] // 8, image.shape[1] // 8, len(judged()[0])), np.float32)
    return plain_climb(x, x + random.normal(0, 0.015, x.shape).astype(np.float32)), x


MASKS = ("Perlin mask", "fractal mask")
"""Generators that leave the image as it is."""
ON_OBJECTS = ("tiles (MemSeg)", "NSA, on the object")
"""Those that keep to an object, which images of a material have not."""


def generators(size: tuple[int, int]) -> dict[str, Generator]:
    """All of them by name; DRAEM's texture is the other image."""

    def cloned(key: jax.Array, image: jax.Array, other: jax.Array) -> anomaly.Anomalous:
        inside = jnp.pad(jnp.ones([n - 2 for n in size], bool), 1)
        mask = perlin.perlin_mask(key, size, (1, 3), 0.3) & inside
        moved = jnp.roll(other, [n // 3 for n in size], (0, 1))
        return jnp.clip(poisson.seamless_clone(image, moved, mask), 0, 1), mask

    def textured(key: jax.Array, image: jax.Array, other: jax.Array) -> anomaly.Anomalous:
        change, draw = jax.random.split(key)
        return anomaly.textured(draw, image, texture.changed(change, other, texture.BOLD_CHANGES))

    def tiles(key: jax.Array, image: jax.Array, other: jax.Array) -> anomaly.Anomalous:
        del other
        order, draw = jax.random.split(key)
        within = anomaly.foreground(image)
        return anomaly.textured(draw, image, anomaly.shuffled(order, image), opacity=(0.15, 1.0), foreground=within)

    def natural_on_object(key: jax.Array, image: jax.Array, other: jax.Array) -> anomaly.Anomalous:
        objects = (anomaly.foreground(image), anomaly.foreground(other))
        return nsa.natural(key, image, other, foregrounds=objects, least_object=0.7)

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
        "NSA": lambda key, image, other: nsa.natural(key, image, other),
        "NSA, mixed": lambda key, image, other: nsa.natural(key, image, other, mixed=True),
        "NSA, on the object": natural_on_object,
    }


def climb(x: jax.Array, moved: jax.Array) -> jax.Array:
    """Features made anomalous as GLASS does, by its own constants."""
    first, second = judged()

    def loss(x: jax.Array) -> jax.Array:
        return optax.sigmoid_binary_cross_entropy(jax.nn.leaky_relu(x @ first, 0.2) @ second, jnp.ones(())).sum()

    return ascend(loss, moved, STEPS, STEP, EVERY, lambda moved: into_shell(moved, x, jnp.float32(APART)))


def ascent(key: jax.Array, image: jax.Array, other: jax.Array) -> tuple[jax.Array, jax.Array]:
    """GLASS's, of patches at every eighth pixel."""
    del other
    normal, noise = jax.random.split(key)
    x = jax.random.normal(normal, (1, image.shape[0] // 8, image.shape[1] // 8, len(judged()[0])))
    return climb(x, x + 0.015 * jax.random.normal(noise, x.shape)), x


BEYOND: dict[str, Generator] = {
    "CutPaste, 3-way": lambda key, image, other: cutpaste.three_way(key, image),
    "feature ascent (GLASS)": ascent,
}
"""What is not an image with an anomaly, but measured too."""


def of_jaxad(options: Options) -> dict[str, Generator]:
    """The generators asked for by name.

    Raises:
        ValueError: There is no generator of such a name.
    """
    known = generators((options.size, options.size)) | (BEYOND if options.sheet is None else {})
    unknown = set(options.generators).difference(known)
    if unknown:
        raise ValueError(f"generators must be of {', '.join(known)}; got {', '.join(sorted(unknown))}")
    return {name: known[name] for name in options.generators or known}


PLAIN: dict[str, Callable[[np.random.Generator, np.ndarray, np.ndarray], Made]] = {
    "CutPaste": plain_cutpaste,
    "CutPaste, rotated": plain_rotated,
    "scar": plain_scar,
    "Perlin mask": plain_mask,
    "fractal mask": plain_fractal,
    "texture (DRAEM)": plain_textured,
    "tiles (MemSeg)": plain_tiles,
    "confetti": plain_confetti,
    "Poisson cloning": plain_cloned,
    "NSA": plain_natural,
    "CutPaste, 3-way": plain_both,
    "feature ascent (GLASS)": plain_ascent,
}


def rates(call: Callable[[int], Any], images: int, seconds: float) -> list[float]:
    """Images a second of every call, for so many seconds and at least two calls."""
    call(0)
    found, end = [], time.perf_counter() + seconds
    while len(found) < 2 or time.perf_counter() < end:
        started = time.perf_counter()
        call(len(found))
        found.append(images / (time.perf_counter() - started))
    return found


def measured(options: Options) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every generator on both sides, by name."""
    names = ("fabric", "tablet")
    images = np.stack([render(names[i % 2], i, size=options.size)[0] for i in range(options.batch)])
    others = np.stack([render(names[i % 2], i + 100, size=options.size)[0] for i in range(options.batch)])
    float_images, float_others = (jnp.asarray(x, jnp.float32) / 255 for x in (images, others))
    for name, make in of_jaxad(options).items():
        program, started = jax.jit(jax.vmap(make)), time.perf_counter()
        keys = jax.random.split(jax.random.key(0), (64, options.batch))
        jax.block_until_ready(program(keys[0], float_images, float_others))
        row: dict[str, Any] = {"compile_seconds": time.perf_counter() - started}

        def together(i: int, program: Any = program, keys: Any = keys) -> None:
            jax.block_until_ready(program(keys[i % len(keys)], float_images, float_others))

        row["images_a_second"] = float(np.median(rates(together, options.batch, options.seconds)))
        if name in PLAIN:
            random = np.random.default_rng(0)

            def apart(i: int, plain: Any = PLAIN[name], random: Any = random) -> None:
                for image, other in zip(images, others, strict=True):
                    plain(random, image, other)

            row["numpy_images_a_second"] = float(np.median(rates(apart, options.batch, options.seconds)))
            row["ratio"] = row["images_a_second"] / row["numpy_images_a_second"]
        print(name, row, flush=True)
        yield name, row


def draw(options: Options, path: Path) -> None:
    """The sheet: a row a generator, four samples with their masks."""
    makes, names = of_jaxad(options), ("fabric", "tablet", "gear", "brushed_metal")
    figure, axes = plt.subplots(len(makes), 8, figsize=(12, 1.55 * len(makes)), squeeze=False)
    for row, (title, make) in zip(axes, makes.items(), strict=True):
        program = jax.jit(make)
        for i, name in enumerate(names):
            image, other = (jnp.asarray(render(name, k, size=options.size)[0], jnp.float32) / 255 for k in (0, 1))
            if "DRAEM" in title:
                other = texture.texture(jax.random.key(i), (options.size, options.size))
            for number in range(64):  # the first draw with an anomaly that can be seen
                made, mask = program(jax.random.key(64 * i + number), image, other)
                if float(jnp.mean(jnp.asarray(mask, jnp.float32))) > 0.004:
                    break
            shown = jnp.where(mask[..., None], 1, made) if title in MASKS else made
            row[2 * i].imshow(np.asarray(shown))
            row[2 * i + 1].imshow(np.asarray(mask, np.float32), cmap="gray", vmin=0, vmax=1)
        row[0].set_ylabel(title, fontsize=9)
        for axis in row:
            axis.set(xticks=[], yticks=[])
    figure.tight_layout(pad=0.3)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=75, format="png")
    plt.close(figure)


def main(options: Options) -> None:
    """Measures and writes, or draws."""
    if options.smoke:
        options.size, options.batch, options.seconds = 64, 2, 0.0
    if options.sheet is not None:
        draw(options, options.sheet)
        return
    record = {"experiment": "bench_generators", "size": options.size}
    path, of_run = options.results / "bench_generators.json", origin()
    old = read_json(path) if path.exists() else {}
    devices = old["devices"] if record.items() <= old.items() else {}
    for name, row in measured(options):
        devices.setdefault(of_run["device"], {})[name] = row | {"batch": options.batch} | of_run
        write_json(path, record | {"devices": devices})


if __name__ == "__main__":
    start(main, Options)
