"""Convolutions with torch's and TensorFlow's padding, and how a torch checkpoint is folded into their parameters."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Shapes = Mapping[str, tuple[int, ...]]
Params = dict[str, dict[str, np.ndarray]]
FLOATS = ("float16", "bfloat16", "float32", "float64")
"""Types in which checkpoints may keep weights."""


def padding(size: int, kernel: int, stride: int, same: bool) -> tuple[int, int]:
    """Zeros before and after an axis of `size` pixels: torch's symmetric padding, or TensorFlow's "SAME"."""
    if not same:
        return kernel // 2, kernel // 2
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def shifts(
    x: Float[Array, "b h w c"], kernel: int, stride: int, pads: list[tuple[int, int]]
) -> Iterator[tuple[int, int, Float[Array, "b h2 w2 c"]]]:
    """For every element (i, j) of a kernel the pixels that it is multiplied by, one for each output position."""
    b, *size, c = x.shape
    ends = [(n + sum(pad) - kernel) // stride * stride + 1 for n, pad in zip(size, pads, strict=True)]
    padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    for i in range(kernel):
        for j in range(kernel):
            last = (b, i + ends[0], j + ends[1], c)
            yield i, j, jax.lax.slice(padded, (0, i, j, 0), last, (1, stride, stride, 1))


def convolve(
    x: Float[Array, "b h w c"],
    kernel: Float[Array, "k k c f"],
    stride: int,
    pads: list[tuple[int, int]],
    dilation: int,
) -> Float[Array, "b h2 w2 f"]:
    """A convolution as a sum of matrix products of shifted images.

    A `vmap` over kernels then does not become a grouped convolution, which is slower on a CPU and on whose gradient
    over several devices XLA's partitioner aborts (jaxlib 0.10.2). The gradient shifts the image again to save memory.
    """
    k = kernel.shape[0]
    padded = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    spans = [n - dilation * (k - 1) for n in padded.shape[1:3]]

    @jax.checkpoint
    def add(total: Array, tap: tuple[Array, Array]) -> tuple[Array, None]:
        position, weights = tap
        row, column = position // k * dilation, position % k * dilation
        window = jax.lax.dynamic_slice(padded, (0, row, column, 0), (len(x), *spans, x.shape[-1]))
        return total + window[:, ::stride, ::stride] @ weights, None

    sizes = [-(-span // stride) for span in spans]
    start = jnp.zeros((len(x), *sizes, kernel.shape[-1]), x.dtype)
    return jax.lax.scan(add, start, (jnp.arange(k * k), kernel.reshape(k * k, *kernel.shape[2:])))[0]


class Conv(nn.Module):
    """A convolution with a bias, which holds the shift of a folded batch norm.

    By default its initial values are zeros, since weights come from files or from `Backbone.init`; students override
    the initializers.
    """

    features: int
    kernel: int
    stride: int = 1
    same: bool = False
    pad: bool = True
    dilation: int = 1
    as_products: bool = False
    """Compute it by `convolve`, for a `vmap` over kernels."""
    kernel_init: nn.initializers.Initializer = nn.initializers.zeros
    bias_init: Callable[[int], nn.initializers.Initializer] = lambda fan_in: nn.initializers.zeros

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 f"]:
        """The convolved map, in the type of `x`."""
        shape = (self.kernel, self.kernel, x.shape[-1], self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        bias = self.param("bias", self.bias_init(math.prod(shape[:-1])), (self.features,), jnp.float32)
        kernel, bias = kernel.astype(x.dtype), bias.astype(x.dtype)
        if self.kernel == 1:  # on a CPU faster than XLA's convolution
            return jnp.matmul(x[:, :: self.stride, :: self.stride], kernel[0, 0]) + bias
        pads = [padding(size, self.kernel, self.stride, self.same) if self.pad else (0, 0) for size in x.shape[1:3]]
        if self.as_products:
            return convolve(x, kernel, self.stride, pads, self.dilation) + bias
        y = jax.lax.conv_general_dilated(
            x,
            kernel,
            (self.stride, self.stride),
            pads,
            rhs_dilation=(self.dilation, self.dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y + bias


class DepthwiseConv(nn.Module):
    """One filter per channel, as a sum of shifted images: on a CPU ten times faster than XLA's grouped convolution."""

    kernel: int
    stride: int = 1
    same: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
        """The filtered map, in the type of `x`."""
        kernel = self.param("kernel", nn.initializers.zeros, (self.kernel, self.kernel, 1, x.shape[-1]), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        pads = [padding(n, self.kernel, self.stride, self.same) for n in x.shape[1:3]]
        y = bias.astype(jnp.float32)
        for i, j, pixels in shifts(x.astype(jnp.float32), self.kernel, self.stride, pads):
            y = y + pixels * kernel[i, j, 0].astype(jnp.float32)
        return y.astype(x.dtype)


class Source(NamedTuple):
    """The names under which a torch checkpoint keeps a convolution and the batch norm behind it."""

    conv: str
    norm: str | None
    """None: no batch norm follows, and the convolution has a bias."""
    eps: float = 1e-5
    biased: bool = False
    """The convolution has a bias, too, before the batch norm."""

    def shapes(self, kernel: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors behind a kernel of that HWIO shape."""
        h, w, i, o = kernel
        vectors = [f"{self.conv}.bias"] if self.norm is None or self.biased else []
        if self.norm is not None:
            vectors += [f"{self.norm}.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var")]
        return {f"{self.conv}.weight": (o, i, h, w)} | dict.fromkeys(vectors, (o,))

    def fold(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Kernel (HWIO) and bias of the convolution with its batch norm folded in, computed in float64."""
        kernel = tensors[f"{self.conv}.weight"].astype(np.float64).transpose(2, 3, 1, 0)
        has_bias = self.norm is None or self.biased
        bias: Any = tensors[f"{self.conv}.bias"].astype(np.float64) if has_bias else 0.0
        if self.norm is not None:
            gain, shift, mean, variance = (
                tensors[f"{self.norm}.{leaf}"].astype(np.float64)
                for leaf in ("weight", "bias", "running_mean", "running_var")
            )
            scale = gain / np.sqrt(variance + self.eps)
            kernel, bias = kernel * scale, shift + (bias - mean) * scale
        return {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}


def complete_modules(stages: tuple[str, ...], expected: Mapping[str, Shapes], tensors: Mapping[str, Any]) -> list[str]:
    """The modules that a checkpoint holds: all of them, or all up to its deepest stage.

    Args:
        stages: Names of the stages, shallow to deep. A module belongs to the stage that its name starts with; a module
            outside of all stages is always required.
        expected: For every module the names and shapes of its tensors.
        tensors: The checkpoint: anything with a shape and a type by name. Tensors of a classifier are ignored: those of
            at most two axes, and timm's `pre_logits`.

    Raises:
        ValueError: A tensor is missing, or has another shape or no float type, or belongs to no module.
    """
    depth = {m: next((i for i, s in enumerate(stages) if m.startswith(f"{s}.") or m == s), -1) for m in expected}
    deepest = max((depth[m] for m in expected if expected[m].keys() & tensors.keys()), default=-1)
    modules = [m for m in expected if depth[m] <= deepest]
    for module in sorted(modules or expected, key=lambda m: depth[m]):
        for key, shape in expected[module].items():
            if key not in tensors:
                raise ValueError(f"needs the tensor {key} of shape {shape}, which is missing")
            if tuple(tensors[key].shape) != shape:
                raise ValueError(f"needs the tensor {key} of shape {shape}, got {tuple(tensors[key].shape)}")
            if tensors[key].dtype.name not in FLOATS:
                raise ValueError(f"needs the tensor {key} in {', '.join(FLOATS)}, got {tensors[key].dtype}")
    known = set().union(*expected.values())
    for key, tensor in tensors.items():
        if len(tensor.shape) == 4 and key not in known and not key.startswith("pre_logits."):
            raise ValueError(f"has no tensor {key}, got one of shape {tuple(tensor.shape)}")
    return modules


def fold(
    stages: tuple[str, ...],
    modules: Mapping[str, Shapes],
    source: Callable[[str], Source],
    tensors: Mapping[str, np.ndarray],
) -> Params:
    """Folds batch norm into the convolutions of a torch checkpoint.

    Args:
        stages: Names of the stages, shallow to deep.
        modules: For every convolution the shapes of its `kernel` (HWIO) and `bias`.
        source: Gives the names under which the checkpoint keeps a convolution.
        tensors: The checkpoint; stages past its deepest one may be missing.

    Returns:
        For every convolution that the checkpoint holds its `kernel` and `bias` in float32.

    Raises:
        ValueError: The checkpoint is of another architecture, or not all of its numbers are finite.
    """
    expected = {module: source(module).shapes(leaves["kernel"]) for module, leaves in modules.items()}
    params = {module: source(module).fold(tensors) for module in complete_modules(stages, expected, tensors)}
    for module, leaves in params.items():
        if not all(np.isfinite(leaf).all() for leaf in leaves.values()):
            raise ValueError(f"needs finite numbers, got others in {source(module).conv} or its batch norm")
    return params
