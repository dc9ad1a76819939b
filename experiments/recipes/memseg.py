"""MemSeg, arXiv:2205.00908: a ResNet-18, 256 px, a memory of 30 images, 5,000 steps of 8, AdamW at 3e-3, DTD.

    python experiments/run.py memseg_bottle --data BOTTLE_FOLDER --weights resnet18.tv_in1k.safetensors --auxiliary DTD
    python experiments/run.py memseg_mtd --data MTD_FOLDER --weights resnet50.caffe_in1k.safetensors --auxiliary DTD
    python experiments/run.py memseg_demo --data demo --weights resnet50.caffe_in1k.safetensors --auxiliary DTD

The last epoch counts, whatever the test images say.
"""

from recipes import MTD, RESNET50, Recipe, published

POOLED = {"channel_pooling": 4}
ANYWHERE = POOLED | {"on_foreground": False}
NOTES = "A ResNet-50 whose channels are averaged by fours, 128 px, 10 epochs"

RECIPES = {
    "memseg_bottle": Recipe(
        "memseg",
        "mvtec_bottle",
        backbone="resnet18.tv_in1k",
        image_size=128,
        hyperparameters={"epochs": 15},
        published=published("reference, last step, 256 px", image_AUROC=1.0, pixel_AUROC=0.981, pixel_AUPRO=0.976),
        notes="128 px and 15 epochs instead of 256 px and 190.",
    ),
    "memseg_mtd": Recipe(
        "memseg",
        backbone=RESNET50,
        image_size=128,
        hyperparameters=ANYWHERE | {"epochs": 3},
        seeds=(0, 1, 2),
        notes="A ResNet-50 whose channels are averaged by fours, 128 px, 3 epochs, anomalies anywhere.",
        **MTD,
    ),
    "memseg_pillqc": Recipe("memseg", "pillqc", RESNET50, POOLED | {"epochs": 10}, image_size=128, notes=f"{NOTES}."),
    "memseg_demo": Recipe(
        "memseg", "demo", RESNET50, ANYWHERE | {"epochs": 10}, image_size=128, notes=f"{NOTES}, anomalies anywhere."
    ),
}
