"""RD4AD, arXiv:2201.10703: Adam at 5e-3 with betas 0.5 and 0.999, 200 epochs of 16 images.

    python -m experiments.run rd4ad_bottle --data BOTTLE_FOLDER --weights resnet18.tv_in1k.safetensors
    python -m experiments.run rd4ad_mtd --data MTD_FOLDER --weights resnet50.caffe_in1k.safetensors
    python -m experiments.run rd4ad_demo --data demo --weights resnet50.caffe_in1k.safetensors

The last epoch counts, whatever the test images say.
"""

from experiments.recipes import MTD, RESNET50, Recipe, published

SMALL = {"epochs": 10, "train_batch_size": 8}
NOTES = "A ResNet-50, 128 px, 10 epochs of 8 images a step."

RECIPES = {
    "rd4ad_bottle": Recipe(
        "rd4ad",
        "mvtec_bottle",
        backbone="resnet18.tv_in1k",
        image_size=256,
        hyperparameters={"epochs": 20, "train_batch_size": 8},
        published=published("anomalib, WRN-50, 256 px", image_AUROC=1.0)
        | published("IM-IAD, backbone not stated, 256 px", pixel_AUROC=0.988, pixel_AP=0.787, pixel_AUPRO=0.968),
        notes="A ResNet-18, 20 epochs of 8 images a step instead of 200 of 16.",
    ),
    "rd4ad_mtd": Recipe(
        "rd4ad",
        backbone=RESNET50,
        image_size=128,
        hyperparameters=SMALL | {"epochs": 6},
        seeds=(0, 1, 2),
        published=published(
            "IM-IAD, backbone not stated, 256 px",
            image_AUROC=0.884,
            image_AP=0.947,
            pixel_AUROC=0.693,
            pixel_AP=0.218,
            pixel_AUPRO=0.623,
        ),
        notes="A ResNet-50, 128 px, 6 epochs of 8 images a step. RD++'s pixel_AUPRO is 0.741 (AnomalyNCD).",
        **MTD,
    ),
    "rd4ad_pillqc": Recipe("rd4ad", "pillqc", RESNET50, SMALL, image_size=128, notes=NOTES),
    "rd4ad_demo": Recipe("rd4ad", "demo", RESNET50, SMALL, image_size=128, notes=NOTES),
}
