"""Networks with few channels, so that a test of their arithmetic takes little time."""

import functools
from typing import Any

from jaxad.backbones.convolution import Conv


def narrow_conv(kernel_init: Any, factor: int = 16) -> Any:
    """Makes convolutions with `factor` times fewer channels, for the field `conv` of a network."""

    def make(features: int, *shape: int, **options: Any) -> Conv:
        return functools.partial(Conv, kernel_init=kernel_init)(max(2, features // factor), *shape, **options)

    return make
