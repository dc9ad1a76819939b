"""MemSeg, arXiv:2205.00908: a ResNet-18, 256 px, a memory of 30 images, 5,000 steps of 8, AdamW at 3e-3, DTD.

    python -m experiments.run memseg_bottle --data BOTTLE_FOLDER --weights resnet18.tv_in1k.safetensors --auxiliary DTD
    python -m experiments.run memseg_mtd --data MTD_FOLDER --weights resnet50.caffe_in1k.safetensors --auxiliary DTD
    python -m experiments.run memseg_demo --data demo --weights resnet50.caffe_in1k.safetensors --auxiliary DTD

`memseg_mtd_paper` has the published steps, for a GPU; it has not been run. The last epoch counts, whatever the test
images say.
"""

from experiments.recipes import MTD, RESNET50, Recipe, published

POOLED = {"channel_pooling": 4, "feature_scale": 0.5}
"""The features of these weights are larger than a ResNet-18's, even averaged over four channels."""
ANYWHERE = POOLED | {"on_foreground": False}
NOTES = "A ResNet-50 whose channels are averaged by fours, 128 px, a seventh of the images in the memory, 20 epochs"

RECIPES = {
    "memseg_bottle": Recipe(
        "memseg",
        "mvtec_bottle",
        backbone="resnet18.tv_in1k",
        image_size=256,
        hyperparameters={"epochs": 100},
        published=published(
            "TooTouch/MemSeg, 256 px, best epoch", image_AUROC=1.0, pixel_AUROC=0.988, pixel_AUPRO=0.984
        ),
        notes="100 epochs instead of 190. TooTouch/MemSeg's last step has a pixel_AUROC of 0.981 and a pixel_AUPRO of "
        "0.976.",
    ),
    "memseg_mtd": Recipe(
        "memseg",
        backbone=RESNET50,
        image_size=128,
        hyperparameters=ANYWHERE | {"memory_size": 109, "epochs": 7},
        seeds=(0, 1, 2),
        notes="A ResNet-50 whose channels are averaged by fours, 128 px, a seventh of the images in the memory, "
        "7 epochs, anomalies anywhere.",
        **MTD,
    ),
    "memseg_mtd_paper": Recipe(
        "memseg",
        backbone=RESNET50,
        image_size=256,
        hyperparameters=ANYWHERE | {"epochs": 53},
        seeds=(0, 1, 2),
        notes="A ResNet-50 whose channels are averaged by fours, the published 5,000 steps, anomalies anywhere.",
        **MTD,
    ),
    "memseg_pillqc": Recipe(
        "memseg",
        "pillqc",
        RESNET50,
        POOLED | {"memory_size": 15, "epochs": 20},
        image_size=128,
        notes=f"{NOTES}.",
    ),
    "memseg_demo": Recipe(
        "memseg",
        "demo",
        RESNET50,
        ANYWHERE | {"memory_size": 6, "epochs": 20},
        image_size=128,
        notes=f"{NOTES}, anomalies anywhere.",
    ),
}
