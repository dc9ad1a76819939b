"""FastFlow, arXiv:2111.07677, as gathierry/FastFlow has it for a ResNet-18: 8 couplings of 3x3 convolutions a level.

    python -m experiments.run fastflow_bottle --data BOTTLE_FOLDER --weights resnet18.tv_in1k.safetensors
    python -m experiments.run fastflow_mtd --data MTD_FOLDER --weights resnet50.caffe_in1k.safetensors
    python -m experiments.run fastflow_demo --data demo --weights resnet50.caffe_in1k.safetensors

The published budget is 500 epochs of 32 images; the recipes here take minutes on two CPU cores, most with small batches
for more steps. The last epoch counts, whatever the test images say. FrEIA's blocks, trained on the same features of
bottle with the same steps, are beside them in epochs_fastflow_bottle.json. The paper's other backbones have recipes
with the published budget, which have not been run.
"""

from experiments.recipes import MTD, RESNET50, Recipe, by_tile, published

FEW = {"layers": ("layer2", "layer3"), "flow_steps": 4, "hidden_ratio": 0.16, "train_batch_size": 4}
SMALL = FEW | {"epochs": 12}
NOTES = "160 px, layers 2 and 3, 4 couplings a sixth as wide, 12 epochs of 4 images a step."

TRANSFORMER = {"flow_steps": 20, "hidden_ratio": 0.16}

BOTTLE = Recipe(
    "fastflow",
    "mvtec_bottle",
    backbone="resnet18.tv_in1k",
    image_size=256,
    hyperparameters={"conv3x3_only": True, "epochs": 16},
    published=published("anomalib, ResNet-18, 256 px, best epoch", image_AUROC=1.0, pixel_AUROC=0.983)
    | published("IM-IAD, ResNet-18, 256 px", pixel_AP=0.688, pixel_AUPRO=0.919),
    notes="16 epochs instead of 500, after which gathierry/FastFlow has a pixel_AUROC of 0.975 (best epoch: 0.979).",
)

RECIPES = {
    "fastflow_bottle": BOTTLE,
    "fastflow_bottle_1x1": BOTTLE._replace(
        hyperparameters={"epochs": 12},
        notes="3x3 and 1x1 in turn, as the paper has it, instead of 3x3 alone; 12 epochs instead of 500.",
    ),
    "fastflow_mtd": Recipe(
        "fastflow",
        backbone=RESNET50,
        image_size=160,
        hyperparameters=FEW | {"epochs": 4},
        seeds=(0, 1, 2),
        published=published(
            "IM-IAD, ResNet-18, 256 px",
            image_AUROC=0.891,
            image_AP=0.947,
            pixel_AUROC=0.71,
            pixel_AP=0.172,
            pixel_AUPRO=0.568,
        ),
        notes="160 px, layers 2 and 3, 4 couplings a sixth as wide, 4 epochs of 4 images a step.",
        **MTD,
    ),
    "fastflow_pillqc": Recipe("fastflow", "pillqc", RESNET50, SMALL, image_size=160, notes=NOTES),
    "fastflow_demo": Recipe("fastflow", "demo", RESNET50, SMALL, image_size=160, notes=NOTES),
    **{
        f"fastflow_bottle_{short}": Recipe(
            "fastflow",
            "mvtec_bottle",
            backbone=backbone,
            image_size=size,
            hyperparameters=hyperparameters,
            published=numbers,
            notes="The published setting, for a GPU.",
        )
        for short, backbone, size, hyperparameters, numbers in (
            (
                "wrn50",
                "wide_resnet50_2.tv_in1k",
                256,
                {},
                published("anomalib, WRN-50, 256 px, best epoch", image_AUROC=1.0)
                | published("gathierry/FastFlow, WRN-50, 256 px, best epoch", pixel_AUROC=0.989),
            ),
            (
                "deit",
                "deit_base_distilled_patch16_384.fb_in1k",
                384,
                TRANSFORMER,
                published("anomalib, DeiT, best epoch", image_AUROC=0.905, pixel_AUROC=0.991),
            ),
            (
                "cait",
                "cait_m48_448.fb_dist_in1k",
                448,
                TRANSFORMER,
                published("anomalib, CaiT, best epoch", image_AUROC=0.986, pixel_AUROC=0.984),
            ),
        )
    },
}
RECIPES |= by_tile(RECIPES, "fastflow_mtd")
