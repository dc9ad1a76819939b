"""Which pixels of a mask are anomalous: masks of two levels, of class numbers, with a palette, with alpha, as JPEG."""

import numpy as np
from jaxtyping import Bool, Shaped
from PIL import Image

CLASSES = 64
"""Integers below are numbers of classes, all of which count; a larger maximum is a shade of gray."""


def values(image: Image.Image) -> Shaped[np.ndarray, "h w"]:
    """One value a pixel, in the units of the file: 0 in the background, or False.

    Of colors the brightest channel; of a mask that is drawn in black on transparent, the alpha. Where none of a
    palette's colors is a gray or black background, its first color is the background.

    Raises:
        ValueError: Black and other colors are drawn on transparent, so that black may mean either.
    """
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        return _drawn(np.asarray(image.convert("RGBA")))
    if image.mode == "P":
        return _of_palette(np.asarray(image), np.asarray(image.convert("RGB")))
    if image.mode not in ("1", "L", "F") and not image.mode.startswith("I"):
        image = image.convert("RGB")
    return brightest(np.asarray(image))


def brightest(pixels: Shaped[np.ndarray, "h w *channels"]) -> Shaped[np.ndarray, "h w"]:
    """The largest channel; of four uint8 channels as of an image with alpha."""
    if pixels.ndim == 3 and pixels.shape[2] == 4 and pixels.dtype == np.uint8:
        return _drawn(pixels)
    return pixels.max(axis=2) if pixels.ndim == 3 else pixels


def anomalous(levels: Shaped[np.ndarray, "h w"], threshold: float | None) -> tuple[Bool[np.ndarray, "h w"], int]:
    """Where a mask is above a threshold.

    Args:
        levels: Of `values`. Bool ignores the threshold.
        threshold: None: half of the maximum, or 0 for integers below `CLASSES`.

    Returns:
        The mask, and how many pixels above 0 the choice of None leaves out.
    """
    if levels.dtype == np.bool_:
        return levels, 0
    if not (np.isfinite(levels).all() and levels.min() >= 0):
        raise ValueError(f"values of a mask must be 0 or more and finite, got {levels.min()} to {levels.max()}")
    if threshold is not None:
        return levels > threshold, 0
    peak = levels.max()
    is_classes = np.issubdtype(levels.dtype, np.integer) and peak < CLASSES
    mask = levels > (0 if is_classes else peak / 2)
    return mask, int(np.count_nonzero((levels > 0) & ~mask))


def _drawn(pixels: Shaped[np.ndarray, "h w 4"]) -> Shaped[np.ndarray, "h w"]:
    colors, alpha = pixels[..., :3].max(axis=2), pixels[..., 3]
    if alpha.min() > 0:
        return colors
    opaque = alpha > 127
    is_black = opaque & (colors == 0)
    if not is_black.any():
        return (colors.astype(np.uint16) * alpha // 255).astype(np.uint8)
    if ((alpha == 255) & (colors >= CLASSES)).any():
        raise ValueError("black and other colors on transparent: which of them is the defect?")
    return alpha


def _of_palette(indices: Shaped[np.ndarray, "h w"], colors: Shaped[np.ndarray, "h w 3"]) -> Shaped[np.ndarray, "h w"]:
    levels = colors.max(axis=2)
    if (levels == colors.min(axis=2)).all() and levels.any():
        return levels  # shades of gray
    is_black = levels == 0
    return ~is_black if is_black.any() and not is_black.all() else indices > 0
