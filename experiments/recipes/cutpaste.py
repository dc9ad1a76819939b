"""CutPaste, arXiv:2104.04015: a ResNet-18, 256 px, 3-way, SGD at 0.03, 256 x 256 steps of 32 normal images.

    python -m experiments.run cutpaste_bottle --data BOTTLE_FOLDER --weights resnet18.tv_in1k.safetensors
    python -m experiments.run cutpaste_mtd --data MTD_FOLDER --weights resnet50.caffe_in1k.safetensors
    python -m experiments.run cutpaste_demo --data demo --weights resnet50.caffe_in1k.safetensors

The networks start from pretrained weights, which end at layer3 here; cutpaste_bottle_scratch only normalizes images as
they do. The last epoch counts, whatever the test images say.
"""

from experiments.recipes import MTD, RESNET50, Recipe, published

SMALL = {"layer": "layer3", "pretrained": True, "head": (512, 128), "train_batch_size": 8, "learning_rate": 1e-3}
NOTES = "A pretrained ResNet-50 up to layer3, 128 px, a head of two layers, 6 epochs of 8 images at 1e-3."
SCRATCH = published("paper, ResNet-18 from scratch, 3-way", image_AUROC=0.983, pixel_AUROC=0.976)
PRETRAINED = SCRATCH | published("paper, pretrained EfficientNet-B4", image_AUROC=1.0)

RECIPES = {
    "cutpaste_bottle": Recipe(
        "cutpaste",
        "mvtec_bottle",
        backbone="resnet18.tv_in1k",
        image_size=128,
        hyperparameters=SMALL | {"epochs": 20},
        published=PRETRAINED,
        notes="A pretrained ResNet-18 up to layer3, 128 px, a head of two layers, 20 epochs of 8 images at 1e-3.",
    ),
    "cutpaste_bottle_scratch": Recipe(
        "cutpaste",
        "mvtec_bottle",
        backbone="resnet18.tv_in1k",
        image_size=128,
        hyperparameters={"epochs": 20, "train_batch_size": 8},
        published=SCRATCH,
        notes="128 px, 20 epochs of 8 images instead of 256 px, 256 of 32.",
    ),
    "cutpaste_bottle_patches": Recipe(
        "cutpaste",
        "mvtec_bottle",
        backbone="resnet18.tv_in1k",
        image_size=256,
        hyperparameters=SMALL | {"patch_size": 64, "stride": 8, "train_batch_size": 32, "epochs": 40},
        published=PRETRAINED,
        notes="A pretrained ResNet-18 up to layer3, patches of 64 px, 40 epochs of 32 images at 1e-3.",
    ),
    "cutpaste_mtd": Recipe(
        "cutpaste",
        backbone=RESNET50,
        image_size=128,
        hyperparameters=SMALL | {"epochs": 2},
        seeds=(0, 1, 2),
        published=published("IM-IAD, ViT-B/16, 256 px", image_AUROC=0.83, image_AP=0.912),
        notes="A pretrained ResNet-50 up to layer3, 128 px, a head of two layers, 2 epochs of 8 images at 1e-3.",
        **MTD,
    ),
    "cutpaste_pillqc": Recipe("cutpaste", "pillqc", RESNET50, SMALL | {"epochs": 6}, image_size=128, notes=NOTES),
    "cutpaste_demo": Recipe("cutpaste", "demo", RESNET50, SMALL | {"epochs": 6}, image_size=128, notes=NOTES),
}
