"""The generators of anomalies in numpy, scipy and Pillow, one image at a time: what bench/generators.py compares with.

Each takes a random generator, an image and another one (uint8, h w 3), and returns an image with an anomaly and its
mask.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.fft
import scipy.sparse
import scipy.sparse.linalg
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from scipy import ndimage

from jaxad.methods.glass import MIN_DISTANCE, STEP_LENGTH, STEPS_PER_PROJECTION

Anomalous = tuple[np.ndarray, np.ndarray]
"""An image, and the mask of its anomaly."""
STEPS = 20
"""Steps of ascent of GLASS's features."""


def jitter(random: np.random.Generator, piece: Image.Image) -> Image.Image:
    """Changes brightness, contrast, saturation and hue by up to a tenth."""
    for kind in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        piece = kind(piece).enhance(random.uniform(0.9, 1.1))
    hue, *rest = piece.convert("HSV").split()
    hue = Image.fromarray(np.asarray(hue) + np.uint8(random.integers(-25, 26) % 256))
    return Image.merge("HSV", (hue, *rest)).convert("RGB")


def pasted(random: np.random.Generator, image: np.ndarray, h: int, w: int, degrees: float) -> Anomalous:
    """Pastes a rectangle of the image elsewhere; the corners of a rotated one may be cut off."""
    size, canvas = image.shape[0], Image.fromarray(image)
    y, x = (int(random.integers(0, size - n + 1)) for n in (h, w))
    piece = jitter(random, canvas.crop((x, y, x + w, y + h)))
    mask = Image.new("L", piece.size, 255)
    if degrees:
        piece, mask = (part.rotate(degrees, expand=True) for part in (piece, mask))
    corner: Any = tuple(
        int(random.integers(0, size - n + 1)) - (m - n) // 2 for n, m in zip((w, h), piece.size, strict=True)
    )
    anomaly = Image.new("L", canvas.size)
    anomaly.paste(mask, corner)
    canvas.paste(piece, corner, mask)
    return np.asarray(canvas), np.asarray(anomaly) > 0


def cutpaste(random: np.random.Generator, image: np.ndarray, other: np.ndarray, degrees: float = 0.0) -> Anomalous:
    """CutPaste; the rectangle turns by up to `degrees` either way."""
    del other
    n = image.shape[0]
    pixels, ratio = random.uniform(0.02, 0.15) * n**2, random.uniform(0.3, 1) ** random.choice((-1, 1))
    h, w = (min(n, max(1, round((pixels * r) ** 0.5))) for r in (ratio, 1 / ratio))
    return pasted(random, image, h, w, random.uniform(-degrees, degrees))


def rotated(random: np.random.Generator, image: np.ndarray, other: np.ndarray) -> Anomalous:
    """CutPaste of a rotated rectangle."""
    return cutpaste(random, image, other, degrees=45.0)


def scar(random: np.random.Generator, image: np.ndarray, other: np.ndarray) -> Anomalous:
    """CutPaste of a thin, rotated rectangle."""
    del other
    h, w = (max(1, round(random.uniform(*span) * image.shape[0] / 256)) for span in ((10, 25), (2, 16)))
    return pasted(random, image, h, w, random.uniform(-45, 45))


def lattice(random: np.random.Generator, n: int, cells: np.ndarray) -> np.ndarray:
    """Perlin noise of n x n pixels in a number of cells (down, across), with repeated gradients as in DRAEM's code."""
    angle = 2 * np.pi * random.random(cells + 1)
    gradient = np.stack([np.cos(angle), np.sin(angle)], -1)
    step = n // cells
    y, x = (np.arange(n) * c / n % 1 for c in cells)
    position = np.stack(np.meshgrid(y, x, indexing="ij"), -1)

    def corner(down: int, across: int) -> np.ndarray:
        directions = gradient[down : down + cells[0], across : across + cells[1]]
        offset = position - np.array([down, across])
        return (directions.repeat(step[0], 0).repeat(step[1], 1) * offset).sum(-1)

    fade = 6 * position**5 - 15 * position**4 + 10 * position**3
    left, right = (corner(0, b) + fade[..., 0] * (corner(1, b) - corner(0, b)) for b in (0, 1))
    return np.sqrt(2) * (left + fade[..., 1] * (right - left))


def perlin_noise(
    random: np.random.Generator, n: int, exponents: tuple[int, int] = (0, 6), octaves: int = 1
) -> np.ndarray:
    """Rotated Perlin noise of n x n pixels; the numbers of cells are random powers of two."""
    cells = 2 ** random.integers(*exponents, 2)
    noise = sum(0.5**i * lattice(random, n, cells << i) for i in range(octaves))
    noise /= np.linalg.norm(0.5 ** np.arange(octaves))
    image = Image.fromarray(noise.astype(np.float32))
    return np.asarray(image.rotate(random.uniform(-90, 90), Image.Resampling.BILINEAR))


def perlin_mask(random: np.random.Generator, image: np.ndarray, other: np.ndarray) -> Anomalous:
    """A mask of Perlin noise; the image does not change."""
    del other
    return image, perlin_noise(random, image.shape[0]) > 0.5


def fractal_mask(random: np.random.Generator, image: np.ndarray, other: np.ndarray) -> Anomalous:
    """A mask of fractal noise; the image does not change."""
    del other
    return image, perlin_noise(random, image.shape[0], (0, 3), 4) > 0.5


def textured(random: np.random.Generator, image: np.ndarray, other: np.ndarray) -> Anomalous:
    """DRAEM's anomaly: the other image, augmented, in a shape of Perlin noise."""
    texture = Image.fromarray(other)
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
        texture = changes[i](texture)
    mask = perlin_noise(random, image.shape[0]) > 0.5
    opacity = random.uniform(0.2, 1)
    mixed = (1 - opacity) * image + opacity * np.asarray(texture)
    return np.where(mask[..., None], mixed, image).astype(np.uint8), mask


def tiles(random: np.random.Generator, image: np.ndarray, other: np.ndarray) -> Anomalous:
    """MemSeg's anomaly: the image in shuffled tiles, on the object (found by Otsu's threshold)."""
    del other
    n, changed = image.shape[0], Image.fromarray(image)
    for flip in (Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.FLIP_LEFT_RIGHT):
        changed = changed.transpose(flip) if random.random() < 0.5 else changed
    changed = jitter(random, changed.rotate(random.uniform(-45, 45), Image.Resampling.BILINEAR))
    pieces = np.asarray(changed).reshape(4, n // 4, 8, n // 8, 3).swapaxes(1, 2).reshape(32, n // 4, n // 8, 3)
    shuffled = pieces[random.permutation(32)].reshape(4, 8, n // 4, n // 8, 3).swapaxes(1, 2).reshape(n, n, 3)
    gray = np.asarray(Image.fromarray(image).convert("L"))
    count = np.bincount(gray.ravel(), minlength=256).astype(float)
    below, total = count.cumsum(), (count * np.arange(256)).cumsum()
    above = below[-1] - below
    between = (total * below[-1] - total[-1] * below) ** 2 / np.maximum(below * above, 1)
    foreground = gray > between.argmax()
    border = [foreground[0], foreground[-1], foreground[:, 0], foreground[:, -1]]
    if np.concatenate(border).mean() > 0.5:
        foreground = ~foreground
    mask, opacity = (perlin_noise(random, n) > 0.5) & foreground, random.uniform(0.15, 1)
    return np.where(mask[..., None], (1 - opacity) * image + opacity * shuffled, image).astype(np.uint8), mask


def cloned(random: np.random.Generator, image: np.ndarray, other: np.ndarray) -> Anomalous:
    """Seamless cloning in a shape of Perlin noise; a sparse direct solver solves Poisson's equation."""
    mask = np.pad(perlin_noise(random, image.shape[0], (1, 3))[1:-1, 1:-1] > 0.3, 1)
    number = np.cumsum(mask).reshape(mask.shape) - 1
    y, x = np.nonzero(mask)
    if not len(y):
        return image, mask
    moved = np.roll(other, [n // 3 for n in image.shape[:2]], (0, 1)).astype(float)
    matrix, right = scipy.sparse.eye(len(y), format="csc") * 4, np.zeros((len(y), 3))
    for down, across in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        neighbor = y + down, x + across
        right += moved[y, x] - moved[neighbor]
        inside = mask[neighbor]
        right += np.where(inside[:, None], 0, image[neighbor])
        rows = number[y, x][inside]
        columns = number[neighbor][inside]
        matrix = matrix - scipy.sparse.csc_matrix((np.ones(len(rows)), (rows, columns)), matrix.shape)
    result = image.astype(float)
    result[y, x] = scipy.sparse.linalg.splu(matrix).solve(right)
    return np.clip(result, 0, 255).astype(np.uint8), mask


def confetti(random: np.random.Generator, image: np.ndarray, other: np.ndarray) -> Anomalous:
    """Rotated rectangles of one color."""
    del other
    canvas, mask = Image.fromarray(image), Image.new("L", image.shape[1::-1])
    draws = ImageDraw.Draw(canvas), ImageDraw.Draw(mask)
    for _ in range(random.integers(1, 5)):
        half, center = random.uniform(8 / 480, 54 / 480, 2) * image.shape[0], random.uniform(0, image.shape[0], 2)
        angle = random.uniform(-np.pi / 4, np.pi / 4)
        rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        corners = [tuple(center + rotation @ (half * sign)) for sign in ((-1, -1), (-1, 1), (1, 1), (1, -1))]
        color = random.integers(0, 256, 3) if random.random() < 0.5 else np.full(3, random.integers(0, 256))
        draws[0].polygon(corners, fill=tuple(map(int, color)))
        draws[1].polygon(corners, fill=255)
    return np.asarray(canvas), np.asarray(mask) > 0


def nsa(random: np.random.Generator, image: np.ndarray, other: np.ndarray) -> Anomalous:
    """NSA's anomaly of up to three rectangles, whose Poisson equations sine transforms solve."""
    n, result = image.shape[0], image / np.float32(255)
    for i in range(3):
        if i and random.random() < 0.5:
            continue
        half = np.clip((0.03 + random.gamma(2, 0.05, 2)) * n, 0.03 * n, 0.4 * n)
        center = random.uniform(0.03 * n, 0.97 * n, 2)
        low, high = (np.clip(center + s * half, 0, n).astype(int) for s in (-1, 1))
        factor = min(np.clip(random.normal(1, 0.5), 0.7, 1.3), 0.4 * n / (high - low).max())
        h, w = np.maximum(((high - low) * factor).astype(int), 3)
        piece = Image.fromarray(other[low[0] : high[0], low[1] : high[1]]).resize((w, h), Image.Resampling.BILINEAR)
        y, x = (int(random.integers(0, n - s + 1)) for s in (h, w))
        target, source = result[y : y + h, x : x + w], np.asarray(piece) / np.float32(255)
        gap = source - target
        right = 4 * gap[1:-1, 1:-1] - gap[:-2, 1:-1] - gap[2:, 1:-1] - gap[1:-1, :-2] - gap[1:-1, 2:]
        values = [(2 - 2 * np.cos(np.pi * np.arange(1, s - 1) / (s - 1))).astype(np.float32) for s in (h, w)]
        scale = values[0][:, None, None] + values[1][None, :, None]
        change: Any = scipy.fft.idstn(scipy.fft.dstn(right, 1, axes=(0, 1)) / scale, 1, axes=(0, 1))
        result[y + 1 : y + h - 1, x + 1 : x + w - 1] = np.clip(target[1:-1, 1:-1] + change, 0, 1)
    difference = np.abs(255 * result - image).mean(-1)
    mask = ndimage.uniform_filter((difference > 1).astype(np.float32), 5, mode="constant") > 0.5
    label = mask / (1 + np.exp(-(ndimage.uniform_filter(difference, 11) - 20) / 6))
    return (255 * result).astype(np.uint8), label


def three_way(random: np.random.Generator, image: np.ndarray, other: np.ndarray) -> Anomalous:
    """CutPaste's three classes: the image, a rectangle and a scar; and the masks of the last two."""
    images, masks = zip(*(generator(random, image, other) for generator in (cutpaste, scar)), strict=True)
    return np.stack([image, *images]), np.stack(masks)


@functools.cache
def discriminator() -> tuple[np.ndarray, np.ndarray]:
    """The matrices of an untrained discriminator of GLASS, for the channels of a ResNet-18's layers 2 and 3."""
    random = np.random.default_rng(0)
    draws = (random.standard_normal((n, m)) * (2 / (n + m)) ** 0.5 for n, m in ((384, 1024), (1024, 1)))
    first, second = (x.astype(np.float32) for x in draws)
    return first, second


def climb(x: np.ndarray, moved: np.ndarray) -> np.ndarray:
    """GLASS's ascent of features (... c) that start near the normal ones x, its gradient written out."""
    first, second = discriminator()
    for i in range(STEPS):
        hidden = moved @ first
        slope = np.where(hidden > 0, np.float32(1), np.float32(0.2))
        gradient = (slope * second[:, 0] / (1 + np.exp((hidden * slope) @ second))) @ -first.T
        moved = moved + np.float32(STEP_LENGTH) * gradient / np.linalg.norm(gradient, axis=-1, keepdims=True)
        if (i + 1) % STEPS_PER_PROJECTION == 0:
            offset = moved - x
            distance = np.linalg.norm(offset, axis=-1, keepdims=True)
            moved = x + offset * np.clip(distance, MIN_DISTANCE, 2 * MIN_DISTANCE) / distance
    return moved


def ascent(random: np.random.Generator, image: np.ndarray, other: np.ndarray) -> Anomalous:
    """GLASS's anomalous features of patches at every eighth pixel, and the normal features."""
    del other
    x = random.standard_normal((image.shape[0] // 8, image.shape[1] // 8, len(discriminator()[0])), np.float32)
    return climb(x, x + random.normal(0, 0.015, x.shape).astype(np.float32)), x


GENERATORS: dict[str, Callable[[np.random.Generator, np.ndarray, np.ndarray], Anomalous]] = {
    "CutPaste": cutpaste,
    "CutPaste, rotated": rotated,
    "scar": scar,
    "Perlin mask": perlin_mask,
    "fractal mask": fractal_mask,
    "texture (DRAEM)": textured,
    "tiles (MemSeg)": tiles,
    "confetti": confetti,
    "Poisson cloning": cloned,
    "NSA": nsa,
    "CutPaste, 3-way": three_way,
    "feature ascent (GLASS)": ascent,
}
