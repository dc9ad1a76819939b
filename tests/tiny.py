"""Backbones with few channels for tests, built as a user builds a backbone that is not registered."""

from jaxad.backbones import ResidualBlocks, patchnet, pdn, resnet

TINY_RESNET = resnet.make("tiny_resnet", ResidualBlocks((1, 1, 1, 1), 1.0, 16))
"""A ResNet with one basic block a stage."""
TINY_PDN = pdn.make("tiny_pdn", ((4, 8), (4, 16), (3, 16), (4, pdn.OUT)))
"""A network of EfficientAD."""
PATCH9 = patchnet.make("patch9", patchnet.Layout(9, ((4, 8, True), (3, patchnet.OUT, False))))
PATCH13 = patchnet.make("patch13", patchnet.Layout(13, ((4, 8, True), (5, patchnet.OUT, False))))
"""Networks of patches of 9 and 13 px."""
