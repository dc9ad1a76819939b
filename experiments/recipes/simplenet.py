"""SimpleNet, arXiv:2303.15140: a discriminator of 1,024 units, noise of 0.015, 160 epochs of 8 images at 2e-4.

    python -m experiments.run simplenet_bottle --data BOTTLE_FOLDER --weights resnet18.tv_in1k.safetensors
    python -m experiments.run simplenet_mtd --data MTD_FOLDER --weights resnet50.caffe_in1k.safetensors
    python -m experiments.run simplenet_demo --data demo --weights resnet50.caffe_in1k.safetensors

`simplenet_mtd_paper` has the published epochs, for a GPU; it has not been run. The last epoch counts, whatever the test
images say.
"""

from experiments.recipes import MTD, RESNET50, Recipe, by_tile

SMALL = {"layers": ("layer2", "layer3"), "feature_scale": 0.125, "epochs": 30}
"""The features of these weights are large. This is the largest of three scales at which the discriminator separates
held-out tiles from noise (a loss below 0.1, see select_simplenet_mtd_feature_scale.json)."""
ROWS = {"epochs": 20, "train_batch_size": 380, "rows_per_step": 256, "precise_statistics": True}
"""Steps of 256 patches from 380 images, as many on MTD as 160 epochs of 8 of them take."""
NOTES = "A ResNet-50, 128 px, 30 epochs."

RECIPES = {
    "simplenet_bottle": Recipe(
        "simplenet",
        "mvtec_bottle",
        backbone="resnet18.tv_in1k",
        image_size=256,
        hyperparameters={"epochs": 15},
        notes="A ResNet-18, 256 px and 15 epochs instead of a WRN-50, 288 px and 160.",
    ),
    "simplenet_mtd": Recipe(
        "simplenet",
        backbone=RESNET50,
        image_size=128,
        hyperparameters=SMALL | ROWS,
        seeds=(0, 1, 2),
        notes="A ResNet-50, 128 px; the published 15,200 steps, of 256 patches instead of all patches of 8 images.",
        **MTD,
    ),
    "simplenet_mtd_paper": Recipe(
        "simplenet",
        backbone=RESNET50,
        image_size=288,
        hyperparameters={"feature_scale": 0.25, "epochs": 160},
        seeds=(0, 1, 2),
        notes="A ResNet-50, its features of the spread of a ResNet-18's, otherwise the published setting.",
        **MTD,
    ),
    "simplenet_pillqc": Recipe("simplenet", "pillqc", RESNET50, SMALL, image_size=128, notes=NOTES),
    "simplenet_demo": Recipe("simplenet", "demo", RESNET50, SMALL, image_size=128, notes=NOTES),
}
RECIPES |= by_tile(RECIPES, "simplenet_mtd")
