"""Affine couplings: a network (the conditioner) computes scales and shifts of one part of an event from the other."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import distrax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxad.base import Key, PyTree

Clamp = Literal["atan", "tanh"]
SHARE = 0.636
"""2 / pi, rounded as in the published code."""
Conditioner = Callable[[Any], Any]
"""The part that stays unchanged -> log scales and shifts of the other part, concatenated on the last axis."""


def soft_clamp(x: Float[Array, "*s"], limit: float, kind: Clamp) -> Float[Array, "*s"]:
    """Within ±limit everywhere, and around 0 nearly 0.636 * x ("atan") or limit * x ("tanh").

    Source: "atan": Ardizzone et al., arXiv:1907.02392, as in CS-Flow's and DifferNet's code; "tanh": RealNVP, Dinh et
    al., arXiv:1605.08803, as in FrEIA's AllInOneBlock.

    Args:
        x: Any numbers.
        limit: The bound, above 0.
        kind: The saturating function.

    Raises:
        ValueError: The limit is not above 0, or the function is unknown.
    """
    if not limit > 0:
        raise ValueError(f"clamp must be above 0, got {limit}")
    if kind == "atan":
        return limit * SHARE * jnp.arctan(x / limit)
    if kind == "tanh":
        return limit * jnp.tanh(x)
    raise ValueError(f'the soft clamp must be "atan" or "tanh", got "{kind}"')


def clamped_affine(raw: Float[Array, "*s c2"], clamp: float, kind: Clamp) -> distrax.Bijector:
    """exp(soft_clamp(log scale)) * x + shift, from the output of a conditioner."""
    log_scale, shift = jnp.split(raw, 2, -1)
    return distrax.ScalarAffine(shift, log_scale=soft_clamp(log_scale, clamp, kind))


def coupling(
    conditioner: Conditioner, channels: int, *, clamp: float, kind: Clamp, event_ndims: int, swap: bool = False
) -> distrax.Bijector:
    """Transforms the second part of the channels (the smaller one if their number is odd), or with `swap` the first.

    Source: RealNVP, arXiv:1605.08803, Eq. 7-8.

    Args:
        conditioner: Computes the parameters of the part that is transformed.
        channels: Size of the last axis of an event.
        clamp: Bound of the log scales.
        kind: The function that bounds them.
        event_ndims: 1 for vectors, 3 for images (h w c).
        swap: Transform the first part.
    """
    inner = functools.partial(clamped_affine, clamp=clamp, kind=kind)
    return distrax.SplitCoupling(channels - channels // 2, event_ndims, conditioner, inner, swap)


def glow_coupling(
    conditioners: tuple[Conditioner, Conditioner], channels: int, *, clamp: float, kind: Clamp, event_ndims: int
) -> distrax.Bijector:
    """Transforms the first part (the smaller one if the number of channels is odd), then the second.

    Source: Kingma, Dhariwal, arXiv:1807.03039, as in FrEIA's GLOWCouplingBlock.

    Args:
        conditioners: Compute the parameters of the first part, and of the second.
        channels: Size of the last axis of an event.
        clamp: Bound of the log scales.
        kind: The function that bounds them.
        event_ndims: 1 for vectors, 3 for images (h w c).
    """
    inner = functools.partial(clamped_affine, clamp=clamp, kind=kind)
    first, second = (
        distrax.SplitCoupling(channels // 2, event_ndims, conditioner, inner, swap)
        for conditioner, swap in zip(conditioners, (True, False), strict=True)
    )
    return distrax.Chain([second, first])


class GlowNetworks(NamedTuple):
    """The two networks of a `glow_coupling` or a `CrossScaleCoupling`."""

    make: Callable[[int], Any]
    """Number of outputs -> flax module."""
    channels: int

    def init(self, keys: Iterable[Key], example: Callable[[int], Any]) -> tuple[PyTree, PyTree]:
        """Parameters of both, one key each; `example` makes an input with a number of channels."""
        n = self.channels // 2
        first, second = (
            network.init(key, example(inputs))
            for network, key, inputs in zip(self._networks(), keys, (self.channels - n, n), strict=True)
        )
        return first, second

    def conditioners(self, params: tuple[PyTree, PyTree]) -> tuple[Conditioner, Conditioner]:
        """The networks with these parameters."""
        first, second = (functools.partial(net.apply, p) for net, p in zip(self._networks(), params, strict=True))
        return first, second

    def _networks(self) -> tuple[Any, Any]:
        n = self.channels // 2
        return self.make(2 * n), self.make(2 * (self.channels - n))


def shifted_and_scaled(raw: Float[Array, "*s c2"]) -> distrax.Bijector:
    """exp(log scale) * (x + shift), from the output of a conditioner that bounds the log scales itself."""
    log_scale, shift = jnp.split(raw, 2, -1)
    return distrax.ScalarAffine(shift * jnp.exp(log_scale), log_scale=log_scale)


def half_coupling(conditioner: Conditioner, channels: int) -> distrax.Bijector:
    """Transforms the first half of the channels of an image, conditioned on the second.

    Source: RealNVP, arXiv:1605.08803, section 3.4, as in the code of Kirichenko et al., arXiv:2006.08545.
    """
    return distrax.SplitCoupling(channels // 2, 3, conditioner, shifted_and_scaled, True)


def masked_coupling(mask: Bool[Array, "*s"], conditioner: Conditioner) -> distrax.Bijector:
    """Transforms the entries of an image or a vector where the mask is False, conditioned on the others.

    Source: RealNVP, arXiv:1605.08803, Eq. 9, as in the code of Kirichenko et al., arXiv:2006.08545.
    """
    return distrax.MaskedCoupling(mask, conditioner, shifted_and_scaled)


class CrossScaleCoupling(distrax.Bijector):
    """A `glow_coupling` of several images of different sizes at once, whose conditioners see all scales.

    Source: CS-Flow, arXiv:2110.02855, Eq. 3-4.

    Args:
        conditioners: (one part of every scale) -> unbounded log scales and shifts of the other part of every scale; the
            first computes those of the first parts, the second those of the second.
        channels: Of every scale.
        clamp: Bound of the log scales.
        kind: The function that bounds them.
    """

    def __init__(
        self,
        conditioners: tuple[Callable[[tuple[Array, ...]], tuple[Array, ...]], ...],
        channels: int,
        *,
        clamp: float,
        kind: Clamp,
    ) -> None:
        super().__init__(event_ndims_in=3)
        self._conditioners, self._split = conditioners, channels // 2
        self._inner = functools.partial(clamped_affine, clamp=clamp, kind=kind)

    def forward_and_log_det(self, x: tuple[Array, ...]) -> tuple[tuple[Array, ...], Array]:
        """Images (... h w c) of all scales -> images of the same shapes, and the log-determinant of all scales."""
        first, second = self._halves(x)
        first, log_det_1 = self._transform(self._conditioners[0], second, first, False)
        second, log_det_2 = self._transform(self._conditioners[1], first, second, False)
        return self._joined(first, second), log_det_1 + log_det_2

    def inverse_and_log_det(self, y: tuple[Array, ...]) -> tuple[tuple[Array, ...], Array]:
        """The inverse of `forward_and_log_det`."""
        first, second = self._halves(y)
        second, log_det_2 = self._transform(self._conditioners[1], first, second, True)
        first, log_det_1 = self._transform(self._conditioners[0], second, first, True)
        return self._joined(first, second), log_det_1 + log_det_2

    def _halves(self, x: tuple[Array, ...]) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        return tuple(s[..., : self._split] for s in x), tuple(s[..., self._split :] for s in x)

    def _joined(self, first: tuple[Array, ...], second: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(jnp.concatenate(parts, -1) for parts in zip(first, second, strict=True))

    def _transform(self, conditioner: Callable, unchanged: tuple, parts: tuple, inverse: bool) -> tuple[tuple, Array]:
        outputs, total = [], jnp.zeros(())
        for raw, x in zip(conditioner(unchanged), parts, strict=True):
            affine = distrax.Block(self._inner(raw), 3)
            y, log_det = affine.inverse_and_log_det(x) if inverse else affine.forward_and_log_det(x)
            outputs.append(y)
            total = total + log_det
        return tuple(outputs), total
