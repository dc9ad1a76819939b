"""Distills a teacher of Uninformed Students: a network of 17, 33 or 65 px patches learns from a ResNet-18.

The loss adds three: a linear decoder gives the ResNet's pooled description of the (enlarged) patch (knowledge
distillation, Eq. 1); a patch is nearer to itself moved, brightened and with noise than to another one (metric learning,
Eq. 2-4); the channels of the description are uncorrelated (compactness, Eq. 5). A tenth of the triplets is gray.

Paper: Uninformed Students, CVPR 2020, arXiv:1911.02357, section 3.1. Differences: the layer3 of the ResNet, the deepest
of the weights at hand, not its last, which sees patches of 96 px; its channels are standardized, as they are smaller
than the last ones and would weigh little beside the other two terms; correlations are squared, so that their sum has a
minimum, and divided by the number of channels; fewer steps.

    python experiments/distill_teacher.py --images IMAGENET_FOLDER --weights resnet18.tv_in1k.safetensors --patch 33

Writes patch33.safetensors and results/distill_patch33.json. A killed run resumes in --workdir. `--smoke` is the variant
that the tests run: a few patches of noise, random weights.
"""

import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from PIL import Image
from safetensors.numpy import save_file

import run
from command import origin, start
from jaxad.files import write_json
from jaxad.backbones import backbone, load, normalize
from jaxad.backbones.convolution import Conv
from jaxad.backbones.patchnet import PatchNetwork
from jaxad.base import Batch, Frozen, Key, Method, Metrics, PyTree, Scores, Stage
from jaxad.data import Preprocess, open_data
from jaxad.driver.fit import fit, score_all
from jaxad.ops.gaussian import Moments, channels, channels_update, moments_init
from jaxad.nn.initial import torch_bias, torch_uniform
from jaxad.training.gradient import Trained, begin, descend, mean_of_valid, torch_adam
from jaxad.ops.image import levels
from photographs import photographs

LAYER = "layer3"
ENLARGED = 96
"""Height and width of a patch that the ResNet sees."""
MARGIN = 1.0
"""By which another patch must be farther away (delta)."""
SETTINGS = ("images", "weights", "patch", "patches", "epochs", "batch_size", "learning_rate", "weight_decay", "seed")
"""Options that a checkpoint belongs to."""
ONE_OF = 20
"""A patch of so many, and a photograph, is held out."""


@dataclasses.dataclass
class Options:
    """Distill a teacher of patches."""

    images: Path = Path("imagenet")
    """Folder of photographs."""
    weights: Path = Path("resnet18.tv_in1k.safetensors")
    """The ResNet's."""
    patch: Literal[17, 33, 65] = 33
    """Height and width of a patch in pixels."""
    patches: int = 20_000
    """Of all photographs together; those of a twentieth of the photographs are held out."""
    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 2e-4
    weight_decay: float = 1e-5
    seed: int = 0
    out: Path | None = None
    """None: patch33.safetensors."""
    results: Path = Path(__file__).parent / "results"
    workdir: Path = Path("runs/distill_teacher")
    smoke: bool = False
    """A few patches of noise."""


class Measuring(NamedTuple):
    """The untrained network and decoder, and the ResNet's descriptions so far."""

    params: PyTree
    moments: Moments


class Distilling(NamedTuple):
    """Network and decoder while they are trained."""

    trained: Trained
    mean: jax.Array
    deviation: jax.Array
    """Of the ResNet's descriptions, by channel."""


def crops(options: Options) -> np.ndarray:
    """Patches of photographs, n s s 3, with a quarter of a patch around them to move in; the held-out ones last.

    A photograph is 4 to 16 patches wide.
    """
    side = options.patch + 2 * (options.patch // 4)
    rng = np.random.default_rng(options.seed)
    if options.smoke:
        return rng.integers(0, 256, (40, side, side, 3), np.uint8)
    paths = photographs(options.images)
    kept, held = (of - of // ONE_OF for of in (options.patches, len(paths)))
    found = []
    for i in range(options.patches):
        of = i % held if i < kept or held == len(paths) else held + i % (len(paths) - held)
        image = Image.open(paths[of]).convert("RGB")
        cut = round(min(image.size) / rng.uniform(4, 16) * side / options.patch)
        left, top = (int(rng.integers(0, length - cut + 1)) for length in image.size)
        found.append(image.resize((side, side), Image.Resampling.BILINEAR, (left, top, left + cut, top + cut)))
    return np.stack(found)


def terms(
    own: jax.Array, near: jax.Array, decoded: jax.Array, target: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The terms of the loss: knowledge distillation and metric learning of every patch, and compactness of all.

    Args:
        own: Descriptions of the patches, b c; the other patch of each is the one before it.
        near: Those of the patches moved, brightened and with noise, b c.
        decoded: What the decoder makes of `own`, b d.
        target: The ResNet's standardized descriptions, b d.
    """
    other = jnp.roll(own, 1, 0)
    apart = lambda a, b: jnp.sum((a - b) ** 2, -1)  # noqa: E731
    metric = nn.relu(MARGIN + apart(own, near) - jnp.minimum(apart(own, other), apart(near, other)))
    standard = (own - own.mean(0)) / jnp.maximum(own.std(0), 1e-6)
    correlation = standard.T @ standard / len(own)
    compact = jnp.sum(correlation**2) - jnp.sum(jnp.diagonal(correlation) ** 2)
    return apart(decoded, target), metric, compact / len(correlation)


def total(distilled: jax.Array, metric: jax.Array, compact: jax.Array, valid: jax.Array) -> jax.Array:
    """The loss of those terms."""
    return mean_of_valid(distilled + metric, valid) + compact


def distillation(options: Options, teacher: str) -> Method:
    """The distillation as a method; its image score is the decoder's squared error over the description's."""
    around, size = options.patch // 4, options.patch
    module = PatchNetwork(  # of shifted products, since XLA's convolutions are slow at small maps on a CPU
        f"patch{size}",
        lambda *shape, **how: Conv(*shape, shifted=True, kernel_init=torch_uniform, bias_init=torch_bias, **how),
        alone=True,
    )
    network = backbone(teacher)
    optimizer = torch_adam(options.learning_rate, options.weight_decay)

    def embed(frozen: Frozen, image: jax.Array) -> PyTree:
        inner = levels(image)[:, around : around + size, around : around + size].astype(jnp.float32) / 255
        enlarged = jax.image.resize(inner, (len(inner), ENLARGED, ENLARGED, 3), "linear")
        return {"image": levels(image), "target": network.apply(frozen, enlarged, (LAYER,))[LAYER].mean((1, 2))}

    def describe(params: PyTree, frozen: Frozen, image: jax.Array) -> jax.Array:
        found: Any = module.apply(params["network"], normalize(frozen, image, jnp.float32), ("stride1",))
        return found["stride1"][:, 0, 0]

    def decoder(x: PyTree) -> nn.Dense:
        return nn.Dense(x["target"].shape[-1])

    def init(key: Key, frozen: Frozen, spec: PyTree) -> Measuring:
        del frozen
        first, second = jax.random.split(key)
        params = {"network": module.init(first, jnp.zeros((1, size, size, 3)), ("stride1",))}
        params["decoder"] = decoder(spec).init(second, jnp.zeros((1, 128)))
        return Measuring(params, moments_init((spec["target"].shape[-1], 1)))

    def measure(key: Key, state: Measuring, frozen: Frozen, batch: Batch) -> tuple[Measuring, Metrics]:
        del key, frozen
        return state._replace(moments=channels_update(state.moments, batch.x["target"], batch.valid)), {}

    def to_distill(key: Key, state: Measuring, frozen: Frozen) -> Distilling:
        del key, frozen
        return Distilling(begin(optimizer, state.params), *channels(state.moments))

    def train(key: Key, state: Distilling, frozen: Frozen, batch: Batch) -> tuple[Distilling, Metrics]:
        image = batch.x["image"].astype(jnp.float32) / 255
        target = (batch.x["target"] - state.mean) / state.deviation
        shift, light, noise, color = jax.random.split(key, 4)
        corners = jax.random.randint(shift, (len(image), 2), 0, 2 * around + 1)
        cut = lambda one, at: jax.lax.dynamic_slice(one, (at[0], at[1], 0), (size, size, 3))  # noqa: E731
        moved = jax.vmap(cut)(image, corners) * jax.random.uniform(light, (len(image), 1, 1, 1), minval=0.9, maxval=1.1)
        moved = jnp.clip(moved + 0.1 * jax.random.normal(noise, moved.shape), 0, 1)
        inner = image[:, around : around + size, around : around + size]
        plain = jax.random.uniform(color, (len(image), 1, 1, 1)) < 0.1
        inner, moved = (jnp.where(plain, x @ jnp.full((3, 3), 1 / 3), x) for x in (inner, moved))

        def loss(params: PyTree) -> jax.Array:
            own, near = jnp.split(describe(params, frozen, jnp.concatenate([inner, moved])), 2)
            decoded: Any = decoder(batch.x).apply(params["decoder"], own)
            return total(*terms(own, near, decoded, target), batch.valid)

        trained, metrics = descend(optimizer, state.trained, loss)
        return state._replace(trained=trained), metrics

    def score(state: Distilling, frozen: Frozen, x: PyTree) -> Scores:
        image = x["image"].astype(jnp.float32)[:, around : around + size, around : around + size] / 255
        params = state.trained.params
        decoded: Any = decoder(x).apply(params["decoder"], describe(params, frozen, image))
        return Scores(jnp.mean((decoded - (x["target"] - state.mean) / state.deviation) ** 2, -1), None)

    stages = (
        Stage("measure", measure, to_distill),
        Stage("train", train, epochs=options.epochs, batch_size=options.batch_size, shuffle=True),
    )
    return Method(embed, init, stages, score)


def main(options: Options) -> None:
    """Distills and writes."""
    name = f"patch{options.patch}"
    teacher = "resnet18.tv_in1k"
    frozen = backbone(teacher).init(jax.random.key(0)) if options.smoke else load(teacher, options.weights)
    patches = crops(options)
    kept = len(patches) - len(patches) // ONE_OF
    data = {
        part: open_data(patches[rows], preprocess=Preprocess(None))["arrays"].train
        for part, rows in (("train", slice(kept)), ("held out", slice(kept, None)))
    }
    settings = [getattr(options, field) for field in SETTINGS]
    method, key = distillation(options, teacher), jax.random.key(options.seed)
    fitted = fit(
        method,
        frozen,
        data["train"],
        key,
        batch_size=options.batch_size,
        checkpoint_dir=options.workdir / f"{name}-{hashlib.sha256(repr(settings).encode()).hexdigest()[:12]}",
        progress=run.progress("patches"),
    )
    error = np.asarray(score_all(method, fitted.state, frozen, data["held out"], batch_size=options.batch_size).image)
    embed: Any = jax.jit(method.embed)
    target = np.asarray(embed(frozen, data["held out"].images(range(len(data["held out"]))))["target"])
    standard = (target - target.mean(0)) / np.asarray(fitted.state.deviation)
    explained = 1 - float(error.mean()) / float(np.mean(standard**2))
    params = fitted.state.trained.params["network"]["params"]
    tensors = {f"{module}.weight": np.asarray(leaf["kernel"]).transpose(3, 2, 0, 1) for module, leaf in params.items()}
    tensors |= {f"{module}.bias": np.asarray(leaf["bias"]) for module, leaf in params.items()}
    out = options.out or Path(f"{name}.safetensors")
    temporary = out.with_suffix(".partial")
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, temporary, metadata={"backbone": name})
    os.replace(temporary, out)
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
