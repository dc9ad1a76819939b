"""DifferNet, arXiv:2008.12577: 8 couplings, Adam 2e-4 with betas 0.8, 24 images x 4 rotations a step.

    python -m experiments.run differnet_bottle --data BOTTLE_FOLDER --weights resnet18.tv_in1k.safetensors
    python -m experiments.run differnet_mtd --data MTD_FOLDER --weights resnet50.caffe_in1k.safetensors
    python -m experiments.run differnet_demo --data demo --weights resnet50.caffe_in1k.safetensors

The published recipe is an AlexNet at 448 px, 64 rotations, 2,048 hidden units and 192 epochs; the recipes here are for
two CPU cores. The last epoch counts, whatever the test images say.
"""

from experiments.recipes import MTD, RESNET50, Recipe, by_tile, published

SMALL = {
    "layer": "layer3",
    "rotations": 4,
    "train_rotations": 2,
    "hidden": 256,
    "epochs": 60,
    "train_batch_size": 8,
    "learning_rate": 1e-3,
}
NOTES = "128 px, 4 rotations, 256 hidden units, 60 epochs of 8 images a step at 1e-3."

RECIPES = {
    "differnet_bottle": Recipe(
        "differnet",
        "mvtec_bottle",
        backbone="resnet18.tv_in1k",
        image_size=256,
        hyperparameters={"layer": "layer3", "rotations": 4, "train_rotations": 2, "hidden": 512, "epochs": 96},
        notes="A ResNet-18's layer 3, 256 px, 4 rotations (2 in a step), 512 hidden units, 96 epochs; no changes of "
        "brightness and contrast. The paper: AlexNet, 448 px, 64 (4), 2,048, 192.",
    ),
    "differnet_mtd": Recipe(
        "differnet",
        backbone=RESNET50,
        hyperparameters={"layer": "layer3", "rotations": 4, "train_rotations": 2, "hidden": 256, "epochs": 40},
        seeds=(0, 1, 2),
        published=published("paper, AlexNet, 448 px", image_AUROC=0.977),
        notes="A ResNet-50's layer 3, 224 px, 4 rotations (2 of them in a step), 256 hidden units and 40 epochs "
        "instead of an AlexNet, 448 px, 64 (4), 2,048 and 192; no changes of brightness and contrast.",
        **MTD,
    ),
    "differnet_pillqc": Recipe("differnet", "pillqc", RESNET50, SMALL, image_size=128, notes=NOTES),
    "differnet_demo": Recipe("differnet", "demo", RESNET50, SMALL, image_size=128, notes=NOTES),
}
RECIPES |= by_tile(RECIPES, "differnet_mtd")
