"""Networks with so few channels that a test of their arithmetic takes a moment."""

import functools
from typing import Any

from jaxad.backbones.convolution import Conv


def narrow_conv(kernel_init: Any, factor: int = 16) -> Any:
    """What makes convolutions of a network with so many times fewer channels."""

    def make(features: int, *shape: int, **how: Any) -> Conv:
        return functools.partial(Conv, kernel_init=kernel_init)(max(2, features // factor), *shape, **how)

    return make
