"""GLASS, arXiv:2407.09359: a discriminator of 1,024 units, 20 steps of ascent, 640 epochs of 8 images at 1e-4, DTD.

    python -m experiments.run glass_bottle --data BOTTLE_FOLDER --weights resnet18.tv_in1k.safetensors --auxiliary DTD
    python -m experiments.run glass_mtd --data MTD_FOLDER --weights resnet50.caffe_in1k.safetensors --auxiliary DTD
    python -m experiments.run glass_demo --data demo --weights resnet50.caffe_in1k.safetensors --auxiliary DTD

`glass_mtd_paper` has the published steps, for a GPU; it has not been run. The last epoch counts, whatever the test
images say.
"""

from experiments.recipes import MTD, RESNET50, Recipe, published

FEW = {"layers": ("layer2", "layer3"), "hidden": 256, "ascent_steps": 10, "learning_rate": 5e-4}
SMALL = FEW | {"feature_scale": 0.0625, "sigma": 2.0}
"""The largest of three scales at which so few steps separate normal from anomalous features of held-out tiles (see
select_glass_mtd_feature_scale.json); the smoothing is in proportion to the image."""
NOTES = "A ResNet-50, 128 px, 256 units, 10 steps of ascent, 16 epochs at 5e-4."

RECIPES = {
    "glass_bottle": Recipe(
        "glass",
        "mvtec_bottle",
        backbone="resnet18.tv_in1k",
        image_size=256,
        hyperparameters=FEW | {"hypothesis": "hypersphere", "on_foreground": True, "epochs": 10},
        published=published("anomalib, WRN-50, 288 px, best epoch", image_AUROC=1.0, pixel_AUROC=0.973),
        notes="A ResNet-18, 256 units, 10 steps of ascent, 10 epochs at 5e-4; paper: a WRN-50, 1,024, 20, 640, 1e-4.",
    ),
    "glass_mtd": Recipe(
        "glass",
        backbone=RESNET50,
        image_size=128,
        hyperparameters=SMALL | {"epochs": 8, "rows_per_step": 256, "shell": 1.0},
        seeds=(0, 1, 2),
        notes="A ResNet-50, 128 px, 256 units, 10 steps of ascent, 8 epochs at 5e-4 of 256 patches a step; the shell "
        "begins at the median distance of normal patches of two images.",
        **MTD,
    ),
    "glass_mtd_paper": Recipe(
        "glass",
        backbone=RESNET50,
        image_size=288,
        hyperparameters={"feature_scale": 0.25, "epochs": 330},
        seeds=(0, 1, 2),
        notes="A ResNet-50, its features of the spread of a ResNet-18's, as many steps as 640 epochs of 392 images.",
        **MTD,
    ),
    "glass_pillqc": Recipe("glass", "pillqc", RESNET50, SMALL | {"epochs": 16}, image_size=128, notes=NOTES),
    "glass_demo": Recipe("glass", "demo", RESNET50, SMALL | {"epochs": 16}, image_size=128, notes=NOTES),
}
