"""Mahalanobis AD, arXiv:2005.14140, on the stages of a ResNet-50 (the paper's headline network is EfficientNet-B4).

    python -m experiments.run mahalanobis_ad_mtd --data MTD_FOLDER --weights resnet50.caffe_in1k.safetensors

Takes a few minutes on two CPU cores, nearly all of them for the network.
"""

from experiments.recipes import MTD, RESNET50, Recipe, by_tile

LAYERS = {"layers": ("layer1", "layer2", "layer3")}
RECIPES = {
    "mahalanobis_ad_mtd": Recipe("mahalanobis_ad", backbone=RESNET50, hyperparameters=LAYERS, **MTD),
    "mahalanobis_ad_mtd_npca": Recipe(
        "mahalanobis_ad", backbone=RESNET50, hyperparameters=LAYERS | {"reduction": "npca"}, **MTD
    ),
    "mahalanobis_ad_pillqc": Recipe("mahalanobis_ad", "pillqc", RESNET50, LAYERS),
}
RECIPES |= by_tile(RECIPES, "mahalanobis_ad_mtd", "mahalanobis_ad_mtd_npca")
