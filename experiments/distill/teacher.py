"""Distills a teacher of Uninformed Students: a network of 17, 33 or 65 px patches learns from a ResNet-18.

The loss has three terms. A linear decoder predicts the ResNet's pooled description of the enlarged patch (knowledge
distillation, Eq. 1). A patch is nearer to a moved, brightened and noisy version of itself than to another patch (metric
learning, Eq. 2-4). The channels of the description are uncorrelated (compactness, Eq. 5). A tenth of the triplets is
gray.

Paper: Uninformed Students, CVPR 2020, arXiv:1911.02357, section 3.1. Differences: the ResNet describes a patch,
enlarged to 96 px, by its layer3, the deepest stage of the available weights, not by its last; channels are
standardized, since those of layer3 are smaller and would hardly count among the other terms; correlations are squared,
so that their sum has a minimum, and divided by the number of channels; fewer steps.

    python -m experiments.distill.teacher --images IMAGENET_FOLDER --weights resnet18.tv_in1k.safetensors --patch 33

Writes patch33.safetensors and results/distill_patch33.json. A killed run resumes from --workdir. `--smoke` is the
variant for the tests: a few patches of noise, random weights.
"""

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float
from PIL import Image
from safetensors.numpy import save_file

from experiments.command import RESULTS, origin, progress, start
from experiments.distill.photographs import photographs
from jaxad.backbones import backbone, load, normalize
from jaxad.backbones.convolution import Conv
from jaxad.backbones.patchnet import LAYOUTS, OUT, PatchNetwork
from jaxad.base import Batch, Frozen, Key, Method, Metrics, PyTree, Scores, Stage, State
from jaxad.data import Preprocess, open_data
from jaxad.driver.execution import Checkpoint, Execution
from jaxad.driver.fit import fit
from jaxad.driver.scoring import score_all
from jaxad.files import replacing, write_json
from jaxad.nn.initial import torch_bias, torch_uniform
from jaxad.ops.gaussian import Moments, channels, channels_update, moments_init
from jaxad.ops.image import levels
from jaxad.training import gradient_stage
from jaxad.training.optimizers import torch_adam

LAYER = "layer3"
ENLARGED = 96
"""Height and width of a patch that the ResNet sees."""
MARGIN = 1.0
"""How much farther away another patch must be (delta)."""
SETTINGS = ("images", "weights", "patch", "patches", "epochs", "batch_size", "learning_rate", "weight_decay", "seed")
"""The options that a checkpoint belongs to."""
HELD_OUT = 20
"""One of so many patches, and of so many photographs, is held out."""


@dataclasses.dataclass
class Options:
    """Distill a teacher of patches."""

    images: Path = Path("imagenet")
    """A folder of photographs."""
    weights: Path = Path("resnet18.tv_in1k.safetensors")
    """The weights of the ResNet."""
    patch: Literal[17, 33, 65] = 33
    """Height and width of a patch in pixels."""
    patches: int = 20_000
    """Patches of all photographs; those of a twentieth of the photographs are held out."""
    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 2e-4
    weight_decay: float = 1e-5
    seed: int = 0
    out: Path | None = None
    """None: patch33.safetensors, or as the patch size is."""
    results: Path = RESULTS
    workdir: Path = Path("runs/distill_teacher")
    smoke: bool = False
    """A few patches of noise."""


class Distilled(NamedTuple):
    """The network and its decoder, and the moments of the ResNet's descriptions."""

    params: PyTree
    """Of both, under `network` and `decoder`."""
    mean: Float[Array, "d"]
    deviation: Float[Array, "d"]
    """Of every channel."""


def crops(options: Options) -> np.ndarray:
    """Patches of photographs, uint8 n s s 3, the held-out ones last.

    A photograph is 4 to 16 patches wide. Around a patch is a border of a quarter of its size, to move in.
    """
    side = options.patch + 2 * (options.patch // 4)
    rng = np.random.default_rng(options.seed)
    if options.smoke:
        return rng.integers(0, 256, (40, side, side, 3), np.uint8)
    paths = photographs(options.images)
    train_patches, train_paths = (n - n // HELD_OUT for n in (options.patches, len(paths)))
    patches = []
    for i in range(options.patches):
        training = i < train_patches or train_paths == len(paths)
        number = i % train_paths if training else train_paths + i % (len(paths) - train_paths)
        image = Image.open(paths[number]).convert("RGB")
        cut = round(min(image.size) / rng.uniform(4, 16) * side / options.patch)
        left, top = (int(rng.integers(0, length - cut + 1)) for length in image.size)
        patches.append(image.resize((side, side), Image.Resampling.BILINEAR, (left, top, left + cut, top + cut)))
    return np.stack(patches)


def terms(
    description: jax.Array, near: jax.Array, decoded: jax.Array, target: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The terms of the loss: knowledge distillation and metric learning of every patch (b), and compactness of all.

    Args:
        description: Descriptions of the patches, b c; the negative of each patch is the one before it.
        near: Descriptions of the patches moved, brightened and with noise, b c.
        decoded: What the decoder makes of `description`, b d.
        target: The ResNet's standardized descriptions, b d.
    """

    def distance(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.sum((a - b) ** 2, -1)

    negative = jnp.roll(description, 1, 0)
    nearest = jnp.minimum(distance(description, negative), distance(near, negative))
    metric = nn.relu(MARGIN + distance(description, near) - nearest)
    standard = (description - description.mean(0)) / jnp.maximum(description.std(0), 1e-6)
    correlation = standard.T @ standard / len(description)
    compact = jnp.sum(correlation**2) - jnp.sum(jnp.diagonal(correlation) ** 2)
    return distance(decoded, target), metric, compact / len(correlation)


def total(distillation: jax.Array, metric: jax.Array, compact: jax.Array) -> jax.Array:
    """The loss as the sum of its terms."""
    return jnp.mean(distillation + metric) + compact


def distillation(options: Options, teacher: str) -> Method:
    """The distillation as a method; an image scores the decoder's squared error."""
    border, size = options.patch // 4, options.patch
    # XLA's convolutions are slow on a CPU where maps are small.
    conv = functools.partial(Conv, kernel_init=torch_uniform, bias_init=torch_bias, as_products=True)
    module = PatchNetwork(LAYOUTS[f"patch{size}"], conv, single_patch=True)
    network = backbone(teacher)

    def inner(image: jax.Array) -> jax.Array:
        return image[:, border : border + size, border : border + size]

    def embed(frozen: Frozen, image: jax.Array) -> PyTree:
        patch = inner(levels(image)).astype(jnp.float32) / 255
        enlarged = jax.image.resize(patch, (len(patch), ENLARGED, ENLARGED, 3), "linear")
        return {"image": levels(image), "target": network.apply(frozen, enlarged, (LAYER,))[LAYER].mean((1, 2))}

    def describe(params: PyTree, frozen: Frozen, image: jax.Array) -> jax.Array:
        maps: Any = module.apply(params["network"], normalize(frozen, image, jnp.float32), ("stride1",))
        return maps["stride1"][:, 0, 0]

    def decode(params: PyTree, description: jax.Array, target: jax.Array) -> jax.Array:
        return nn.Dense(target.shape[-1]).apply(params["decoder"], description)  # pyright: ignore[reportReturnType]

    def standardized(model: Distilled, target: jax.Array) -> jax.Array:
        return (target - model.mean) / model.deviation

    def init_moments(key: Key, state: State, frozen: Frozen, spec: PyTree) -> Moments:
        del key, state, frozen
        return moments_init((spec["target"].shape[-1], 1))

    def measure(key: Key, moments: Moments, frozen: Frozen, batch: Batch) -> tuple[Moments, Metrics]:
        del key, frozen
        return channels_update(moments, batch.x["target"], batch.valid), {}

    def init(key: Key, state: Moments, frozen: Frozen, spec: PyTree) -> Distilled:
        del frozen
        network_key, decoder_key = jax.random.split(key)
        decoder = nn.Dense(spec["target"].shape[-1])
        params = {
            "network": module.init(network_key, jnp.zeros((1, size, size, 3)), ("stride1",)),
            "decoder": decoder.init(decoder_key, jnp.zeros((1, OUT))),
        }
        return Distilled(params, *channels(state))

    def loss(
        params: PyTree, model: Distilled, key: Key, frozen: Frozen, batch: Batch
    ) -> tuple[jax.Array, dict[str, PyTree]]:
        image = batch.x["image"].astype(jnp.float32) / 255
        shift_key, light_key, noise_key, color_key = jax.random.split(key, 4)
        corners = jax.random.randint(shift_key, (len(image), 2), 0, 2 * border + 1)
        cut = jax.vmap(lambda one, at: jax.lax.dynamic_slice(one, (at[0], at[1], 0), (size, size, 3)))
        moved = cut(image, corners) * jax.random.uniform(light_key, (len(image), 1, 1, 1), minval=0.9, maxval=1.1)
        moved = jnp.clip(moved + 0.1 * jax.random.normal(noise_key, moved.shape), 0, 1)
        gray = jax.random.uniform(color_key, (len(image), 1, 1, 1)) < 0.1
        patches = [jnp.where(gray, x @ jnp.full((3, 3), 1 / 3), x) for x in (inner(image), moved)]
        description, near = jnp.split(describe(params, frozen, jnp.concatenate(patches)), 2)
        target = batch.x["target"]
        decoded = decode(params, description, target)
        return total(*terms(description, near, decoded, standardized(model, target))), {}

    def score(model: Distilled, frozen: Frozen, x: PyTree) -> Scores:
        image = inner(x["image"].astype(jnp.float32)) / 255
        decoded = decode(model.params, describe(model.params, frozen, image), x["target"])
        return Scores(jnp.mean((decoded - standardized(model, x["target"])) ** 2, -1), None)

    optimizer = torch_adam(options.learning_rate, options.weight_decay)
    budget: dict[str, Any] = dict(epochs=options.epochs, batch_size=options.batch_size)
    stages = (Stage("measure", init_moments, measure), gradient_stage("train", init, loss, optimizer, **budget))
    return Method(embed, stages, score)


def main(options: Options) -> None:
    """Distills, and writes the weights and results/distill_patchN.json."""
    name = f"patch{options.patch}"
    teacher = "resnet18.tv_in1k"
    frozen = backbone(teacher).init(jax.random.key(0)) if options.smoke else load(teacher, options.weights)
    patches = crops(options)
    end = len(patches) - len(patches) // HELD_OUT
    train, held_out = (
        open_data(part, preprocess=Preprocess(None))["arrays"].train for part in (patches[:end], patches[end:])
    )
    assert train is not None and held_out is not None
    settings = repr([getattr(options, field) for field in SETTINGS])
    folder = options.workdir / f"{name}-{hashlib.sha256(settings.encode()).hexdigest()[:12]}"
    method, key = distillation(options, teacher), jax.random.key(options.seed)
    execution = Execution(batch_size=options.batch_size, checkpoint=Checkpoint(folder), progress=progress("patches"))
    fitted = fit(method, frozen, train, key, execution)
    scoring = Execution(batch_size=options.batch_size)
    error = np.asarray(score_all(method, fitted.state, frozen, held_out, scoring).image)
    embed: Any = jax.jit(method.embed)
    target = np.asarray(embed(frozen, held_out.images(range(len(held_out))))["target"])
    standard = (target - target.mean(0)) / np.asarray(fitted.state.deviation)
    explained = 1 - float(error.mean()) / float(np.mean(standard**2))
    params = fitted.state.params["network"]["params"]
    tensors = {f"{module}.weight": np.asarray(leaf["kernel"]).transpose(3, 2, 0, 1) for module, leaf in params.items()}
    tensors |= {f"{module}.bias": np.asarray(leaf["bias"]) for module, leaf in params.items()}
    tensors = {k: np.ascontiguousarray(v) for k, v in tensors.items()}
    with replacing(options.out or Path(f"{name}.safetensors")) as temporary:
        save_file(tensors, temporary, metadata={"backbone": name})
    record = {
        "experiment": f"distill_{name}",
        "teacher": teacher,
        "patches": len(patches),
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "variance_explained": explained,
        "seconds": fitted.run_seconds,
        **origin(),
    }
    write_json(options.results / f"distill_{name}.json", record)
    print(f"{name}: {explained:.3f} of the variance of held-out patches explained", flush=True)


if __name__ == "__main__":
    start(main, Options)
