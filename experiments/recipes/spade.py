"""SPADE, arXiv:2005.02357.

K is 5 as in the reference implementation (the paper: 50), and layer3, the deepest stage of the available weights,
describes the image (the paper: layer4). That is the likely reason for an image AUROC above IM-IAD's on MTD: the pooled
layer3 of a texture says more than features close to the classes of ImageNet. The network (ResNet-50 for WRN-50) and the
image size (224 for 256) differ as well, and IM-IAD's split is not published.

    python -m experiments.run spade_mtd --data MTD_FOLDER --weights resnet50.caffe_in1k.safetensors

Scoring compares 3,136 positions with those of K images, which takes a few tenths of a second per image and neighbor on
two CPU cores.
"""

from experiments.recipes import MTD, RESNET50, Recipe, by_tile, published

LAYER3 = {"image_layer": "layer3", "num_neighbors": 5}
RECIPES = {
    "spade_mtd": Recipe(
        "spade",
        backbone=RESNET50,
        hyperparameters=LAYER3,
        published=published(
            "IM-IAD, WRN-50, 256 px",
            image_AUROC=0.868,
            image_AP=0.928,
            pixel_AUROC=0.742,
            pixel_AP=0.123,
            pixel_AUPRO=0.627,
        ),
        notes="Above the published image AUROC: the image is described by layer3 instead of layer4, which the weights "
        "at hand lack, with K = 5; network, image size and split differ as well.",
        **MTD,
    ),
    "spade_pillqc": Recipe("spade", "pillqc", RESNET50, LAYER3),
}
RECIPES |= by_tile(RECIPES, "spade_mtd")
