"""Affine couplings: one part of an event is scaled and shifted by what a network, the conditioner, says of the rest."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import distrax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxad.base import Key, PyTree

Clamp = Literal["atan", "tanh"]
Conditioner = Callable[[Any], Any]
"""The part that stays as it is -> raw log scales and shifts for the other part, side by side on the last axis."""


def soft_clamp(x: Float[Array, "*s"], limit: float, kind: Clamp) -> Float[Array, "*s"]:
    """Nearly x around 0, and within +-limit everywhere.

    Source: "atan" Ardizzone et al., arXiv:1907.02392, as FrEIA has it; "tanh" Dinh et al., arXiv:1605.08803.

    Args:
        x: Any numbers.
        limit: The bound, above 0.
        kind: The function that saturates.

    Raises:
        ValueError: The limit is not above 0, or there is no such function.
    """
    if not limit > 0:
        raise ValueError(f"clamp must be above 0, got {limit}")
    if kind == "atan":
        return limit * (2 / jnp.pi) * jnp.arctan(x / limit)
    if kind == "tanh":
        return limit * jnp.tanh(x / limit)
    raise ValueError(f'the soft clamp must be "atan" or "tanh", got "{kind}"')


def clamped_affine(raw: Float[Array, "*s c2"], clamp: float, kind: Clamp) -> distrax.Bijector:
    """exp(soft_clamp(log scale)) * x + shift, from what a conditioner returns."""
    log_scale, shift = jnp.split(raw, 2, -1)
    return distrax.ScalarAffine(shift, log_scale=soft_clamp(log_scale, clamp, kind))


def coupling(
    conditioner: Conditioner, channels: int, *, clamp: float, kind: Clamp, event_ndims: int, swap: bool = False
) -> distrax.Bijector:
    """Transforms the second part of the channels (the smaller where they are odd), or with `swap` the first.

    Source: RealNVP, arXiv:1605.08803, Eq. 7-8.

    Args:
        conditioner: A network for the parameters of the part that is transformed.
        channels: On the last axis of an event.
        clamp: Bound of the log scales.
        kind: How they are bounded.
        event_ndims: 1 for vectors, 3 for images (h w c).
        swap: Transform the first part.
    """
    inner = functools.partial(clamped_affine, clamp=clamp, kind=kind)
    return distrax.SplitCoupling(channels - channels // 2, event_ndims, conditioner, inner, swap)


def glow_coupling(
    conditioners: tuple[Conditioner, Conditioner], channels: int, *, clamp: float, kind: Clamp, event_ndims: int
) -> distrax.Bijector:
    """Transforms both parts, first the first and then the second.

    Source: Kingma, Dhariwal, arXiv:1807.03039, as FrEIA's GLOWCouplingBlock has it.

    Args:
        conditioners: Networks for the parameters of the first part, and of the second.
        channels: As for `coupling`, like the rest.
        clamp: Bound of the log scales.
        kind: How they are bounded.
        event_ndims: 1 for vectors, 3 for images (h w c).
    """
    options: dict[str, Any] = dict(clamp=clamp, kind=kind, event_ndims=event_ndims)
    first, second = (coupling(f, channels, swap=not i, **options) for i, f in enumerate(conditioners))
    return distrax.Chain([second, first])


class GlowNetworks(NamedTuple):
    """The two networks of a `glow_coupling` or a `CrossScaleCoupling`."""

    make: Callable[[int], Any]
    """Number of outputs -> flax module."""
    channels: int

    def init(self, keys: Iterable[Key], given: Callable[[int], Any]) -> tuple[PyTree, PyTree]:
        """Parameters of both, by a key for each; `given` makes an input, from its number of channels."""
        second = self.channels // 2
        first, last = (
            net.init(key, given(n))
            for net, key, n in zip(self._both(), keys, (second, self.channels - second), strict=True)
        )
        return first, last

    def conditioners(self, params: tuple[PyTree, PyTree]) -> tuple[Conditioner, Conditioner]:
        """Those with these parameters."""
        first, last = (functools.partial(net.apply, own) for net, own in zip(self._both(), params, strict=True))
        return first, last

    def _both(self) -> tuple[Any, Any]:
        second = self.channels // 2
        return self.make(2 * (self.channels - second)), self.make(2 * second)


def masked_coupling(
    mask: Bool[Array, "h w c"], conditioner: Conditioner, *, clamp: float, kind: Clamp
) -> distrax.Bijector:
    """Transforms the pixels of an image where the mask is False, by what the conditioner says of the others.

    Source: RealNVP, arXiv:1605.08803, Eq. 9.
    """
    return distrax.MaskedCoupling(mask, conditioner, functools.partial(clamped_affine, clamp=clamp, kind=kind))


class CrossScaleCoupling(distrax.Bijector):
    """A `glow_coupling` of several images of different sizes at once; conditioners see all scales together.

    Source: CS-Flow, arXiv:2110.02855, Eq. 3-4.

    Args:
        conditioners: (parts of all scales) -> raw log scales and shifts of all, for the first parts and for the second.
        channels: Of every scale.
        clamp: Bound of the log scales.
        kind: How they are bounded.
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
        self._conditioners, self._split = conditioners, channels - channels // 2
        self._inner = functools.partial(clamped_affine, clamp=clamp, kind=kind)

    def forward_and_log_det(self, x: tuple[Array, ...]) -> tuple[tuple[Array, ...], Array]:
        """Images (... h w c) of all scales -> the same, and one log-determinant for all together."""
        first, second = self._halves(x)
        first, log_det_1 = self._transform(self._conditioners[0], second, first, False)
        second, log_det_2 = self._transform(self._conditioners[1], first, second, False)
        return self._joined(first, second), log_det_1 + log_det_2

    def inverse_and_log_det(self, y: tuple[Array, ...]) -> tuple[tuple[Array, ...], Array]:
        """The other way round."""
        first, second = self._halves(y)
        second, log_det_2 = self._transform(self._conditioners[1], first, second, True)
        first, log_det_1 = self._transform(self._conditioners[0], second, first, True)
        return self._joined(first, second), log_det_1 + log_det_2

    def _halves(self, x: tuple[Array, ...]) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        return tuple(s[..., : self._split] for s in x), tuple(s[..., self._split :] for s in x)

    def _joined(self, first: tuple[Array, ...], second: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(jnp.concatenate(parts, -1) for parts in zip(first, second, strict=True))

    def _transform(self, conditioner: Callable, given: tuple, moved: tuple, back: bool) -> tuple[tuple, Array]:
        done, total = [], jnp.zeros(())
        for raw, x in zip(conditioner(given), moved, strict=True):
            affine = distrax.Block(self._inner(raw), 3)
            y, log_det = affine.inverse_and_log_det(x) if back else affine.forward_and_log_det(x)
            done.append(y)
            total = total + log_det
        return tuple(done), total
