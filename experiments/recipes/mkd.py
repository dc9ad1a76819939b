"""MKD, arXiv:2011.11108: a VGG-16 teaches a narrow cloner at four depths, 600 epochs of 64 images at 128 px, Adam 1e-3.

    python -m experiments.run mkd_bottle --data BOTTLE_FOLDER --weights resnet18.tv_in1k.safetensors
    python -m experiments.run mkd_mtd --data MTD_FOLDER --weights resnet50.caffe_in1k.safetensors
    python -m experiments.run mkd_demo --data demo --weights resnet50.caffe_in1k.safetensors

No weights of a VGG are available here: the teachers are ResNets, compared at layers 1 to 3. `mkd_bottle_vgg16` is the
published setting, which has not been run. The last epoch counts, whatever the test images say.
"""

from experiments.recipes import MTD, RESNET50, Recipe

FEW = {"train_batch_size": 8}
SMALL = FEW | {"epochs": 20}
NOTES = "No VGG weights at hand: a ResNet-50 teaches, 128 px, 20 epochs of 8 images a step."

RECIPES = {
    "mkd_bottle": Recipe(
        "mkd",
        "mvtec_bottle",
        backbone="resnet18.tv_in1k",
        image_size=128,
        hyperparameters=FEW | {"epochs": 30},
        notes="No VGG weights at hand: a ResNet-18 teaches; 30 epochs of 8 images a step instead of 600 of 64.",
    ),
    "mkd_bottle_vgg16": Recipe(
        "mkd",
        "mvtec_bottle",
        backbone="vgg16.tv_in1k",
        image_size=128,
        notes="The published setting.",
    ),
    "mkd_mtd": Recipe(
        "mkd",
        backbone=RESNET50,
        image_size=128,
        hyperparameters=FEW | {"epochs": 3},
        seeds=(0, 1, 2),
        notes="No VGG weights at hand: a ResNet-50 teaches, 3 epochs of 8 images a step.",
        **MTD,
    ),
    "mkd_pillqc": Recipe("mkd", "pillqc", RESNET50, SMALL, image_size=128, notes=NOTES),
    "mkd_demo": Recipe("mkd", "demo", RESNET50, SMALL, image_size=128, notes=NOTES),
}
