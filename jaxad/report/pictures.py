"""Heat-map overlays and contours, and image files that are never half written."""

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
    """Lay a heat map over an image.

    Opacity grows with the heat, from none at `low` to full strength halfway to `high`. Take both limits from a whole
    run, not from the one map: then a good image stays calm and looks like itself.

    Args:
        image: RGB, 0..255.
        heat: anomaly scores, one per pixel of `image`.
        low: score that leaves the pixel as it is.
        high: score that takes the hottest color; above it nothing changes.
        alpha: greatest opacity, 0..1.

    Raises:
        ValueError: shapes that differ, limits in the wrong order, or `alpha` outside 0..1.
    """
    if image.shape != (*heat.shape, 3):
        raise ValueError(f"the heat map must have the size of the image; got {heat.shape} for {image.shape}: resize it")
    if not low <= high:
        raise ValueError(f"low must not exceed high; got low={low}, high={high}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be between 0 and 1; got {alpha}")
    warmth = np.clip((heat.astype(np.float64) - low) / max(high - low, np.finfo(np.float32).tiny), 0, 1)
    color = matplotlib.colormaps[COLORMAP](warmth)[..., :3] * 255
    opacity = alpha * np.minimum(2 * warmth, 1)[..., None]
    return np.rint(image * (1 - opacity) + color * opacity).astype(np.uint8)


def contour(
    image: UInt8[np.ndarray, "h w 3"], mask: Bool[np.ndarray, "height width"], color: tuple[int, int, int]
) -> UInt8[np.ndarray, "h w 3"]:
    """Draw the outline of a mask: two pixels wide, one on each side of the edge; the frame of the image closes it.

    Raises:
        ValueError: shapes that differ.
    """
    if image.shape != (*mask.shape, 3):
        raise ValueError(f"the mask must have the size of the image; got {mask.shape} for {image.shape}: resize it")
    line = np.logical_and(ndimage.binary_dilation(mask), np.logical_not(ndimage.binary_erosion(mask)))
    return np.where(line[..., None], np.asarray(color, np.uint8), image)


def save_png(path: Path, image: UInt8[np.ndarray, "h w *channels"]) -> None:
    """Write an image (RGB or gray) as PNG; folders are made, and the file appears whole or not at all."""
    with replacing(path) as temporary:
        Image.fromarray(image).save(temporary, format="PNG")


def save_tiff(path: Path, heat: Float[np.ndarray, "h w"]) -> None:
    """Write raw anomaly scores as a float32 TIFF; folders are made, and the file appears whole or not at all."""
    with replacing(path) as temporary:
        Image.fromarray(heat.astype(np.float32)).save(temporary, format="TIFF")
