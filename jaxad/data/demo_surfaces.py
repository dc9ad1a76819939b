"""Surfaces of the demo data set: four products, and five kinds of defects that modify them."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float32
from PIL import Image, ImageDraw
from scipy import ndimage

Map = Float32[np.ndarray, "h w"]
Random = np.random.Generator


@dataclasses.dataclass
class Surface:
    """The surface to be lit. Lengths are in units of 1/256 of the side of the image."""

    albedo: Float32[np.ndarray, "h w 3"]
    """Diffuse reflectance, in linear light."""
    height: Map
    gloss: Map
    """Strength of the specular reflection."""
    cover: Map
    """1 on the product, 0 on the background."""
    core: tuple[float, float, float]
    """Reflectance of the material under the surface."""
    shine: float
    """Exponent of the specular reflection."""
    softness: float
    """How easily the material deforms: from 0 for steel to 1 for cloth."""


def _fabric(random: Random, size: int) -> Surface:
    """A plain weave of slightly uneven yarns."""
    y, x = grid(size)
    u, v = _rotate(x, y, random.normal(0, 0.012))
    sway = [0.13 * noise(random, size, 3) + 0.015 * noise(random, size, 20) for _ in range(2)]
    u = u / 7.4 + random.uniform(0, 2) + sway[0]
    v = v / 8.1 + random.uniform(0, 2) + sway[1]
    i, j = np.floor(u), np.floor(v)
    a, b = u - i - 0.5, v - j - 0.5
    yarns = random.normal(1, 0.035, (2, 64)).astype(np.float32)
    warp_tone, weft_tone = yarns[0, i.astype(np.intp) % 64], yarns[1, j.astype(np.intp) % 64]
    thick = [1 + 0.05 * noise(random, size, cells) for cells in ((50, 14), (14, 50))]
    wave_v, wave_u = np.sin(np.pi * v), np.sin(np.pi * u)
    warp = np.sqrt(np.maximum(1 - (2.15 * a / thick[0]) ** 2, 0)) + 0.45 * (1 - 2 * (i % 2)) * wave_v
    weft = np.sqrt(np.maximum(1 - (2.15 * b / thick[1]) ** 2, 0)) - 0.45 * (1 - 2 * (j % 2)) * wave_u
    on_top = warp > weft
    plies = np.sin(2 * np.pi * np.where(on_top, 1.9 * a + 2.6 * v, 1.9 * b + 2.6 * u))
    fuzz = noise(random, size, 128)
    height = np.maximum(warp, weft) + 0.13 * plies + 0.10 * fuzz
    tone = np.where(on_top, warp_tone, weft_tone) * (0.40 + 0.60 * np.clip((height + 0.1) / 1.3, 0, 1))
    tone = tone * (1 + 0.05 * plies + 0.05 * fuzz + 0.02 * noise(random, size, 6))
    color = np.where(on_top[..., None], _linear(0.43, 0.51, 0.60), _linear(0.70, 0.69, 0.65))
    return Surface(
        albedo=color * tone[..., None],
        height=1.1 * height + 0.5 * noise(random, size, 4),
        gloss=np.full((size, size), 0.015, np.float32),
        cover=np.ones((size, size), np.float32),
        core=(0.78, 0.76, 0.71),
        shine=6.0,
        softness=1.0,
    )


def _metal(random: Random, size: int) -> Surface:
    """A ground steel plate with long fine grooves and a broad highlight."""
    wide = int(size * 1.25)
    lengths = ((0.5, 0.5), (0.8, 0.16), (0.6, 0.05), (0.35, 0.012))
    grain = np.sum([weight * _streaks(random, wide, length) for weight, length in lengths], 0, np.float32)
    angle = random.normal(0, 0.8)
    rotated = Image.fromarray(grain).rotate(angle, Image.Resampling.BICUBIC)
    margin = (wide - size) // 2
    grain = np.asarray(rotated)[margin : margin + size, margin : margin + size]
    tarnish = noise(random, size, 3) + 0.5 * noise(random, size, 9)
    tone = 1 + 0.085 * grain + 0.025 * tarnish
    return Surface(
        albedo=(_linear(0.50, 0.505, 0.51) * tone[..., None]).astype(np.float32),
        height=(0.16 * grain + 0.9 * noise(random, size, 2)).astype(np.float32),
        gloss=(0.42 * (1 + 0.22 * grain)).astype(np.float32),
        cover=np.ones((size, size), np.float32),
        core=(0.62, 0.62, 0.62),
        shine=14.0,
        softness=0.35,
    )


def _gear(random: Random, size: int) -> Surface:
    """A turned spur gear with hub, bore, keyway and five lightening holes on dark felt."""
    y, x = grid(size)
    cx, cy = random.normal(128, 2.2), random.normal(128, 2.2)
    turn = random.normal(0, 0.04)
    dx, dy = _rotate(x - cx, y - cy, turn)
    r, angle = np.hypot(dx, dy), np.arctan2(dy, dx)
    tooth = np.clip(2.2 * np.cos(26 * angle), -1, 1)
    outside = r - (101 + 5.5 * tooth)
    bore = 19.5 - r
    bore = np.maximum(bore, np.minimum(4.5 - np.abs(dx), np.minimum(24.5 + dy, -dy)))
    fifth = (angle - 0.3 + np.pi / 5) % (2 * np.pi / 5) - np.pi / 5
    holes = 12.5 - np.hypot(r * np.cos(fifth) - 66, r * np.sin(fifth))
    edge = np.maximum(np.maximum(outside, bore), holes)
    cover = _step(-edge, 0.8)
    bevel = np.clip(-edge / 3.2, 0, 1)
    hub = _step(37 - r, 1.5)
    groove = np.exp(-(((r - 88) / 1.5) ** 2))
    turning = ndimage.gaussian_filter1d(random.standard_normal(1024, np.float32), 0.8) * np.float32(1.3)
    rings = turning[(r * 5.3).astype(np.intp)]
    felt = noise(random, size, 128) + 0.4 * noise(random, size, 40)
    metal = 2.6 * np.sin(bevel * np.pi / 2) + 2.2 * hub - 1.3 * groove + 0.10 * rings
    height = np.where(edge < 0, metal + 0.5 * noise(random, size, 3), 0.16 * felt)
    bow = np.cos(angle + turn - random.normal(-2.2, 0.08)) ** 4
    tone = 1 + 0.07 * rings + 0.03 * noise(random, size, 5) + 0.03 * noise(random, size, 100) - 0.35 * groove
    albedo = _linear(0.55, 0.545, 0.53) * (tone * (0.72 + 0.5 * bow))[..., None]
    cloth = _linear(0.235, 0.245, 0.26) * (1 + 0.15 * felt)[..., None]
    return Surface(
        albedo=(cover[..., None] * albedo + (1 - cover[..., None]) * cloth).astype(np.float32),
        height=height.astype(np.float32),
        gloss=(cover * (0.20 + 0.25 * bow) * (1 + 0.2 * rings)).astype(np.float32),
        cover=cover.astype(np.float32),
        core=(0.58, 0.58, 0.56),
        shine=22.0,
        softness=0.5,
    )


def _tablet(random: Random, size: int) -> Surface:
    """A film-coated oblong tablet with a score line and embossed letters, on a gray tray."""
    y, x = grid(size)
    cx, cy = random.normal(128, 3), random.normal(128, 3)
    dx, dy = _rotate(x - cx, y - cy, random.normal(0, 0.05))
    wide, high = 96 + random.normal(0, 0.5), 54 + random.normal(0, 0.5)
    along = np.maximum(np.abs(dx) - (wide - high), 0)
    edge = np.hypot(along, dy) - high
    cover = _step(-edge, 0.9)
    depth = np.clip(-edge / high, 0, 1)
    dome = 30 * np.sqrt(np.maximum(1 - (1 - depth) ** 2.6, 0))
    peel = 0.05 * noise(random, size, 50) + 0.07 * noise(random, size, 120) + 0.16 * noise(random, size, 16)
    emboss = ndimage.map_coordinates(_letters(), [(dy + 64) * 2, (dx + 128) * 2], order=1)
    score = np.exp(-((dx / 2.2) ** 2)) * np.clip(depth * 6, 0, 1)
    height = np.where(edge < 0, dome + peel - 1.9 * emboss - 2.6 * score, 0.3 * noise(random, size, 50))
    specks = np.clip(noise(random, size, 120) - 1.9, 0, 1)
    tone = 1 + 0.012 * noise(random, size, 4) + 0.015 * noise(random, size, 80) - 0.22 * specks
    tone = tone - 0.10 * emboss - 0.12 * score
    coat = _linear(0.86, 0.66, 0.52) * random.normal(1, 0.012, 3).astype(np.float32)
    grime = 1 + 0.04 * noise(random, size, 128) + 0.04 * noise(random, size, 5)
    tray = _linear(0.40, 0.43, 0.46) * grime[..., None]
    return Surface(
        albedo=(cover[..., None] * coat * tone[..., None] + (1 - cover[..., None]) * tray).astype(np.float32),
        height=height.astype(np.float32),
        gloss=(cover * 0.22 + (1 - cover) * 0.02).astype(np.float32),
        cover=cover.astype(np.float32),
        core=(0.85, 0.81, 0.74),
        shine=38.0,
        softness=0.8,
    )


CATEGORIES: dict[str, Callable[[Random, int], Surface]] = {
    "brushed_metal": _metal,
    "fabric": _fabric,
    "gear": _gear,
    "tablet": _tablet,
}
"""The products."""


def _scratch(random: Random, surface: Surface) -> tuple[Map, Map]:
    size = surface.height.shape[0]
    start = _place(random, surface)
    line = _walk(random, start, random.uniform(40, 95), random.uniform(0, np.pi), 0.02, 0.0)
    width = random.uniform(1.8, 2.8) * (1 + 0.6 * surface.softness)
    lines = [(line, _taper(len(line), width))]
    if random.random() < 0.4:
        second = line[len(line) // 4 :] + random.normal(0, 2.2, 2)
        lines.append((second, _taper(len(second), 0.8 * width)))
    coverage = _strokes(size, lines) * surface.cover
    patchy = np.clip(0.75 + 0.3 * noise(random, size, 40), 0.3, 1)
    groove = ndimage.gaussian_filter(coverage, 0.6 * size / 256)
    burr = ndimage.gaussian_filter(coverage, 1.6 * size / 256) - groove
    _flatten(surface, coverage)
    surface.height += (1.8 + surface.softness) * (1.0 * burr - 1.1 * groove) * patchy
    _blend(surface.albedo, surface.core, (0.6 + 0.2 * surface.softness) * coverage * patchy)
    surface.gloss *= 1 + 0.5 * coverage
    return coverage, _no_shade(size)


def _stain(random: Random, surface: Surface) -> tuple[Map, Map]:
    size = surface.height.shape[0]
    coverage, depth = _blob(random, surface, random.uniform(12, 22), 0.35)
    tint = np.array([(0.55, 0.40, 0.22), (0.36, 0.36, 0.40), (0.60, 0.48, 0.30)][random.integers(3)], np.float32)
    rim = np.exp(-(((depth - 0.10) / 0.10) ** 2))
    strength = coverage * (0.48 + 0.10 * noise(random, size, 12) + 0.25 * rim) * random.uniform(0.85, 1.25)
    surface.albedo *= 1 - np.clip(strength, 0, 1)[..., None] * (1 - tint)
    surface.gloss *= 1 - 0.6 * coverage
    return coverage, _no_shade(size)


def _dent(random: Random, surface: Surface) -> tuple[Map, Map]:
    size = surface.height.shape[0]
    coverage, depth = _blob(random, surface, random.uniform(9, 15), 0.22)
    bowl = np.clip(depth, 0, 1) ** 0.8 * coverage
    roughness = noise(random, size, 70) + 0.7 * noise(random, size, 30)
    _flatten(surface, coverage)
    surface.height -= (6.5 + 0.5 * surface.softness) * bowl + 0.35 * surface.softness * roughness * coverage
    _blend(surface.albedo, surface.core, 0.65 * surface.softness * coverage)
    surface.albedo *= 1 - (0.36 * bowl * (1 + 0.3 * roughness))[..., None]
    surface.gloss *= 1 - 0.5 * coverage
    return coverage, _no_shade(size)


def _crack(random: Random, surface: Surface) -> tuple[Map, Map]:
    size = surface.height.shape[0]
    angle = random.uniform(0, 2 * np.pi)
    trunk = _walk(random, _place(random, surface), random.uniform(45, 80), angle, 0.10, 0.55)
    lines = [(trunk, _taper(len(trunk), random.uniform(1.7, 2.6)))]
    for _ in range(random.integers(1, 4)):
        root = trunk[random.integers(len(trunk) // 5, 4 * len(trunk) // 5)]
        side = angle + random.choice([-1, 1]) * random.uniform(0.5, 1.1)
        branch = _walk(random, root, random.uniform(10, 28), side, 0.1, 0.55, centered=False)
        lines.append((branch, _taper(len(branch), 1.4)))
    coverage = _strokes(size, lines) * surface.cover
    surface.height -= (1.0 + surface.softness) * ndimage.gaussian_filter(coverage, 0.6 * size / 256)
    surface.albedo *= 1 - 0.8 * coverage[..., None]
    surface.gloss *= 1 - 0.9 * coverage
    return coverage, _no_shade(size)


def _fiber(random: Random, surface: Surface) -> tuple[Map, Map]:
    size = surface.height.shape[0]
    line = _walk(random, _place(random, surface), random.uniform(45, 100), random.uniform(0, 2 * np.pi), 0.2, 0.0)
    coverage = _strokes(size, [(line, np.full(len(line), random.uniform(1.7, 2.5)))])
    shadow = _strokes(size, [(line + np.array([2.0, 1.6]), np.full(len(line), 3.0))])
    shade = 1 - 0.42 * ndimage.gaussian_filter(shadow, 1.0 * size / 256) * (1 - coverage)
    colors = ((0.12, 0.11, 0.10), (0.20, 0.24, 0.42), (0.52, 0.18, 0.16), (0.16, 0.30, 0.22))
    _blend(surface.albedo, _linear(*colors[random.integers(4)]), 0.9 * coverage)
    surface.height += 1.0 * ndimage.gaussian_filter(coverage, 0.7 * size / 256)
    surface.gloss += coverage * (0.06 - surface.gloss)
    return coverage, shade.astype(np.float32)


DEFECTS: dict[str, Callable[[Random, Surface], tuple[Map, Map]]] = {
    "crack": _crack,
    "dent": _dent,
    "fiber": _fiber,
    "scratch": _scratch,
    "stain": _stain,
}
"""The kinds of defects; every kind occurs on every product."""


def _linear(*color: float) -> Float32[np.ndarray, "3"]:
    """Converts a display color to linear light."""
    return np.array(color, np.float32) ** np.float32(2.2)


def grid(size: int) -> tuple[Map, Map]:
    """The y and x coordinates of the pixel centers, in units of 1/256 of the side."""
    centers = (np.arange(size, dtype=np.float32) + 0.5) * np.float32(256 / size)
    return np.broadcast_to(centers[:, None], (size, size)), np.broadcast_to(centers[None, :], (size, size))


def _rotate(x: Map, y: Map, angle: float) -> tuple[Map, Map]:
    c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return c * x + s * y, c * y - s * x


def _step(distance: Map, width: float) -> Map:
    """A smooth step: 0 below -width, 1 above width."""
    t = np.clip(distance / (2 * width) + 0.5, 0, 1)
    return t * t * (3 - 2 * t)


def noise(random: Random, size: int, cells: int | tuple[int, int]) -> Map:
    """Smooth noise with `cells` bumps per side and a standard deviation of about one."""
    rows, columns = (cells, cells) if isinstance(cells, int) else cells
    values = Image.fromarray(random.standard_normal((rows + 3, columns + 3), np.float32) * np.float32(1.35))
    offset = random.uniform(0.5, 1.5, 2)
    box = (offset[1], offset[0], offset[1] + columns, offset[0] + rows)
    return np.asarray(values.resize((size, size), Image.Resampling.BICUBIC, box=box))


def _streaks(random: Random, size: int, length: float) -> Map:
    """White noise with standard deviation one, blurred along x over the fraction `length` of the side."""
    window = max(int(length * size), 1)
    lines = ndimage.uniform_filter1d(random.standard_normal((size, size + 2 * window), np.float32), window, axis=1)
    return lines[:, window : window + size] * np.float32(window**0.5)


@functools.cache
def _letters() -> Map:
    """The embossed letters of the tablet, on a canvas of 256 x 128 units with two pixels per unit."""
    canvas = Image.new("L", (1024, 512))
    draw = ImageDraw.Draw(canvas)
    for points in (
        [(318, 160), (318, 300), (306, 334), (276, 348), (246, 334), (234, 300)],
        [(690, 160), (800, 352)],
        [(800, 160), (690, 352)],
    ):
        draw.line(points, fill=255, width=22, joint="curve")
        for px, py in (points[0], points[-1]):
            draw.ellipse((px - 11, py - 11, px + 11, py + 11), fill=255)
    small = np.asarray(canvas.resize((512, 256), Image.Resampling.BOX), np.float32) / 255
    return ndimage.gaussian_filter(small, 2.2)


def _no_shade(size: int) -> Map:
    return np.ones((size, size), np.float32)


def _place(random: Random, surface: Surface) -> np.ndarray:
    """The (x, y) of a random point well inside the product."""
    size = surface.height.shape[0]
    inside = ndimage.uniform_filter(surface.cover, int(14 * size / 256) | 1, mode="nearest") > 0.9
    margin = size // 10
    inside[:margin] = inside[-margin:] = inside[:, :margin] = inside[:, -margin:] = False
    points = np.flatnonzero(inside)
    row, column = divmod(int(points[random.integers(len(points))]), size)
    return (np.array([column, row]) + 0.5) * (256 / size)


def _walk(
    random: Random, start: np.ndarray, length: float, angle: float, bend: float, jag: float, centered: bool = True
) -> np.ndarray:
    """The (n, 2) points of a random line through `start`. `bend` accumulates along the line, `jag` does not."""
    steps = max(int(length / 2), 4)
    curl = np.cumsum(random.normal(0, bend, steps)) + random.normal(0, 0.6 * bend) * np.arange(steps) / 4
    headings = angle + curl + random.normal(0, 1, steps) * jag
    points = np.cumsum(np.stack([np.cos(headings), np.sin(headings)], 1) * (length / steps), 0)
    return start + points - (points[steps // 2] if centered else 0)


def _taper(count: int, width: float) -> np.ndarray:
    """Widths that shrink toward both ends."""
    return width * np.sqrt(np.sin(np.linspace(0.12, np.pi - 0.12, count)))


def _strokes(size: int, lines: list[tuple[np.ndarray, np.ndarray]]) -> Map:
    """The antialiased coverage of lines of varying width."""
    scale = 4 * size / 256
    canvas = Image.new("L", (4 * size, 4 * size))
    draw = ImageDraw.Draw(canvas)
    for points, widths in lines:
        for (x0, y0), (x1, y1), width in zip(points[:-1] * scale, points[1:] * scale, widths[1:] * scale, strict=True):
            draw.line((x0, y0, x1, y1), fill=255, width=max(round(width), 1))
            draw.ellipse((x1 - width / 2, y1 - width / 2, x1 + width / 2, y1 + width / 2), fill=255)
    return np.asarray(canvas.resize((size, size), Image.Resampling.BOX), np.float32) / 255


def _blob(random: Random, surface: Surface, radius: float, wobble: float) -> tuple[Map, Map]:
    """The coverage of an irregular spot on the product, and its depth, from 0 at the border to 1 at the center."""
    size = surface.height.shape[0]
    y, x = grid(size)
    cx, cy = _place(random, surface).tolist()
    dx, dy = _rotate(x - cx, y - cy, random.uniform(0, np.pi))
    angles = np.linspace(-np.pi, np.pi, 1024)
    waves = [random.normal(0, wobble / k) * np.cos(k * angles + random.uniform(0, 6)) for k in range(2, 9)]
    outline = (radius * (1 + 0.7 * np.clip(np.sum(waves, 0), -0.8, 0.8))).astype(np.float32)
    bins = np.arctan2(dy, dx) * np.float32(1023 / (2 * np.pi)) + 511.5
    distance = np.hypot(dx, dy * random.uniform(1, 1.7)) / outline[bins.astype(np.intp)]
    depth = np.clip(1 - distance, 0, 1)
    return _step((1 - distance) * radius, 1.3) * surface.cover, depth


def _blend(albedo: Float32[np.ndarray, "h w 3"], color: Any, weight: Map) -> None:
    albedo += weight[..., None] * (np.asarray(color, np.float32) - albedo)


def _flatten(surface: Surface, coverage: Map) -> None:
    """Smooths the fine relief of a soft material."""
    smooth = ndimage.uniform_filter(surface.height, int(9 * len(coverage) / 256) | 1)
    surface.height += surface.softness * coverage * (smooth - surface.height)
