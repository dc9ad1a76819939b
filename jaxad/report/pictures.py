"""Heat-map overlays, contours, and atomic writes of image files."""

from pathlib import Path

import matplotlib
import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image
from scipy import ndimage

from jaxad.files import replacing

COLORMAP = "plasma"


def overlay(
    image: UInt8[np.ndarray, "h w 3"],
    heat: Float[np.ndarray, "height width"],
    low: float,
    high: float,
    alpha: float = 0.5,
) -> UInt8[np.ndarray, "h w 3"]:
    """Overlays a heat map on an image.

    The opacity rises with the score, from 0 at `low` to `alpha` halfway to `high`. Take the limits from a whole run,
    not from a single map, so that normal images stay nearly unchanged.

    Args:
        image: RGB, 0..255.
        heat: anomaly scores, one per pixel of `image`.
        low: score at the lower end of the color scale; pixels below it stay unchanged.
        high: score at the upper end of the color scale.
        alpha: maximum opacity, 0..1.

    Raises:
        ValueError: shapes that differ, limits in the wrong order, or `alpha` outside 0..1.
    """
    if image.shape != (*heat.shape, 3):
        raise ValueError(f"the heat map must have the size of the image; got {heat.shape} for {image.shape}: resize it")
    if not low <= high:
        raise ValueError(f"low must not exceed high; got low={low}, high={high}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be between 0 and 1; got {alpha}")
    fraction = np.clip((heat.astype(np.float64) - low) / max(high - low, np.finfo(np.float32).tiny), 0, 1)
    color = matplotlib.colormaps[COLORMAP](fraction)[..., :3] * 255
    opacity = alpha * np.minimum(2 * fraction, 1)[..., None]
    return np.rint(image * (1 - opacity) + color * opacity).astype(np.uint8)


def hatch(
    image: UInt8[np.ndarray, "h w 3"], mask: Bool[np.ndarray, "height width"] | None
) -> UInt8[np.ndarray, "h w 3"]:
    """Dims and hatches what a mask marks, with stripes of a 28th of the shorter side; None marks nothing."""
    if mask is None:
        return image
    stripe = max(1, min(mask.shape) // 28)
    diagonal = np.add.outer(*map(np.arange, mask.shape))
    dimmed = np.where((diagonal // stripe % 4 == 0)[..., None], image // 4 + 96, image // 2)
    return np.where(mask[..., None], dimmed, image)


def contour(
    image: UInt8[np.ndarray, "h w 3"], mask: Bool[np.ndarray, "height width"], color: tuple[int, int, int]
) -> UInt8[np.ndarray, "h w 3"]:
    """Draws the outline of a mask, two pixels wide, one on each side of the edge. It is closed at the image border.

    Raises:
        ValueError: shapes that differ.
    """
    if image.shape != (*mask.shape, 3):
        raise ValueError(f"the mask must have the size of the image; got {mask.shape} for {image.shape}: resize it")
    line = np.logical_and(ndimage.binary_dilation(mask), np.logical_not(ndimage.binary_erosion(mask)))
    return np.where(line[..., None], np.asarray(color, np.uint8), image)


def save_png(path: Path, image: UInt8[np.ndarray, "h w *channels"]) -> None:
    """Writes an RGB or gray image as PNG, atomically; creates missing folders."""
    with replacing(path) as temporary:
        Image.fromarray(image).save(temporary, format="PNG")


def save_tiff(path: Path, heat: Float[np.ndarray, "h w"]) -> None:
    """Writes raw anomaly scores as a float32 TIFF, atomically; creates missing folders."""
    with replacing(path) as temporary:
        Image.fromarray(heat.astype(np.float32)).save(temporary, format="TIFF")
