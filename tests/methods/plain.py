"""The layers of networks in plain numpy and float64, to compare flax networks with."""

from typing import Any

import jax
import numpy as np

from jaxad.ops.heatmap import resize_matrix


def randomized(variables: Any, seed: int) -> Any:
    """Random parameters and statistics of the same shapes; variances and scales are above 0."""
    random = np.random.default_rng(seed)

    def draw(path: Any, leaf: jax.Array) -> np.ndarray:
        x = random.normal(0, max(leaf.size, 2) ** -0.25, leaf.shape)
        return (np.abs(x) + 0.5 if path[-1].key in ("var", "scale") else x).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, variables)


def fresh(shapes: Any) -> Any:
    """A training state of these shapes with new networks, drawn here so that nothing is compiled to initialize them."""
    random = np.random.default_rng(1)

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        trained = not any(getattr(part, "name", None) == "optimizer" for part in path)
        name = getattr(path[-1], "key", None) if trained else None
        if name == "kernel":
            return random.normal(0, np.prod(leaf.shape[:-1]) ** -0.5, leaf.shape).astype(np.float32)
        return np.full(leaf.shape, name in ("var", "scale"), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def conv(x: np.ndarray, params: Any, stride: int = 1) -> np.ndarray:
    """A convolution padded with zeros by half of its kernel."""
    kernel = np.asarray(params["kernel"], np.float64)
    half = kernel.shape[0] // 2
    padded = np.pad(x, ((0, 0), (half, half), (half, half), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel.shape[:2], (1, 2))[:, ::stride, ::stride]
    return np.einsum("bhwcij,ijcf->bhwf", windows, kernel) + np.asarray(params.get("bias", 0.0))


def transposed(x: np.ndarray, params: Any) -> np.ndarray:
    """Torch's transposed convolution with stride 2, padding of half the kernel and output padding of 1."""
    kernel = np.asarray(params["kernel"], np.float64)
    (b, h, w, _), k = x.shape, kernel.shape[0]
    output = np.zeros((b, 2 * h + 2 * k, 2 * w + 2 * k, kernel.shape[-1]))
    for i, j in np.ndindex(h, w):
        top, left = (k + 2 * index - k // 2 for index in (i, j))
        output[:, top : top + k, left : left + k] += np.einsum("bc,ijcf->bijf", x[:, i, j], kernel[::-1, ::-1])
    return output[:, k:-k, k:-k]


def norm(x: np.ndarray, params: Any, stats: Any) -> np.ndarray:
    """Batch norm with running statistics."""
    p, s = ({k: np.asarray(v, np.float64) for k, v in part["norm"].items()} for part in (params, stats))
    return (x - s["mean"]) / np.sqrt(s["var"] + 1e-5) * p["scale"] + p["bias"]


def conv_norm(x: np.ndarray, params: Any, stats: Any, stride: int = 1) -> np.ndarray:
    return norm(conv(x, params["conv"], stride), params, stats)


def doubled(x: np.ndarray) -> np.ndarray:
    """Bilinear upsampling to twice the size."""
    rows, columns = (resize_matrix(n, 2 * n) for n in x.shape[1:3])
    return np.einsum("Hh,bhwc,Ww->bHWc", rows, x, columns)
