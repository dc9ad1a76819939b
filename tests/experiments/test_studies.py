"""Studies: the smoke variants write what the tables read."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments.opening import batch_of, open_recipe
from experiments.studies import (
    ablate_generators,
    epoch_curve,
    known_parts,
    narrow_gap,
    new_parts,
    nf_ood,
    select_rate,
    tails,
)
from experiments.update_readme import foreign_images, transfer
from jaxad.base import Method, Stage
from jaxad.data import open_data
from jaxad.ops.heatmap import patch_features
from jaxad.settings import Settings
from tests.methods.plain import fresh, randomized


@pytest.mark.slow
def test_learning_rates_are_compared_on_held_out_images(tmp_path: Path) -> None:
    rates = (1e-12, 1e-4)
    select_rate.main(
        select_rate.Options("nf_demo", rates, epochs=5, learn=24, hold_out=8, results=tmp_path, smoke=True)
    )
    result = json.loads((tmp_path / "select_nf_demo.json").read_text())
    assert result["images"] == {"learned": 24, "held_out": 8}
    unchanged, trained = result["held_out_loss"].values()
    assert len(trained) == 5 and trained[-1] < min(trained[0], unchanged[0])
    np.testing.assert_allclose(unchanged, unchanged[0], rtol=1e-4)


@pytest.mark.slow
def test_other_hyperparameters_are_compared_too(tmp_path: Path) -> None:
    options = dict(vary="blocks", epochs=1, learn=8, hold_out=8, results=tmp_path, smoke=True)
    select_rate.main(select_rate.Options("nf_demo", (1, 2), **options))
    result = json.loads((tmp_path / "select_nf_demo_blocks.json").read_text())
    assert result["varied"] == "blocks" and list(result["held_out_loss"]) == ["1", "2"]
    first, second = result["held_out_loss"].values()
    assert first != second


def test_held_out_loss_is_that_of_the_function_that_scores() -> None:
    """Batch norms use their running statistics, which a step in training does not."""
    size, layers = (16, 16), {"layer1": (8, 8, 3), "layer2": (4, 4, 5)}
    settings = Settings.of("simplenet", backbone="pdn_small", layers=tuple(layers), hidden=6, noise=0.5, image_size=16)
    random = np.random.default_rng(0)
    x = {name: jnp.asarray(random.normal(size=(3, *shape)), jnp.float32) for name, shape in layers.items()}
    [stage] = settings.build(size).stages
    state = fresh(jax.eval_shape(lambda: stage.init(jax.random.key(0), None, None, x)))
    networks = state.model._replace(**{part: randomized(getattr(state.model, part), 3) for part in ("params", "stats")})
    state, batch = state._replace(model=networks), batch_of(x)
    key = jax.random.key(1)
    new, metrics = select_rate.deployed_loss(settings, size)(key, state, None, batch)
    jax.tree.map(np.testing.assert_array_equal, new.model.stats, networks.stats)

    params = networks.params
    normal = jax.jit(lambda x: patch_features(x, tuple(layers)) @ params["adaptor"])(x)
    noise = jax.random.normal(jax.random.fold_in(key, 0), normal.shape)
    discriminator, norm, stats = params["discriminator"], params["discriminator"]["norm"], networks.stats["norm"]

    def outputs(features: np.ndarray) -> np.ndarray:
        y = features @ discriminator["hidden"]["kernel"]
        y = (y - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * norm["scale"] + norm["bias"]
        return np.where(y > 0, y, 0.2 * y) @ discriminator["head"]["kernel"]

    expected = np.maximum(0.5 - outputs(normal), 0).mean() + np.maximum(0.5 + outputs(normal + 0.5 * noise), 0).mean()
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    assert abs(jax.jit(stage.update)(key, state, None, batch)[1]["loss"] - expected) > 0.01 * expected


def test_images_to_hold_out_are_others() -> None:
    data = open_data({"a": np.arange(20, dtype=np.uint8)[:, None, None, None] * np.ones((1, 8, 8, 3), np.uint8)})
    train = data["a"].train
    assert train is not None
    learned, held_out = select_rate.hold_out(train, 12, 8)
    colors = [set(part.images(range(len(part)))[:, 0, 0, 0].tolist()) for part in (learned, held_out)]
    assert list(map(len, colors)) == [12, 8] and not colors[0] & colors[1]
    with pytest.raises(ValueError, match="at most the 20 images, got 21"):
        select_rate.hold_out(train, 13, 8)


def test_recipe_with_photographs_is_opened_with_them(tmp_path: Path) -> None:
    for i in range(2):
        Image.new("RGB", (512, 512), (100 * i, 0, 0)).save(tmp_path / f"{i}.png")
    opened = open_recipe("efficientad_demo", epochs=1, auxiliary=tmp_path)
    assert opened.photographs.shape == (2, 256, 256, 3)
    assert open_recipe("efficientad_demo", smoke=True).photographs.shape == (4, 64, 64, 3)
    assert open_recipe("nf_demo", smoke=True).photographs is None
    with pytest.raises(ValueError, match="auxiliary"):
        open_recipe("efficientad_demo", epochs=1)


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_metrics_of_test_images_by_epoch(tmp_path: Path) -> None:
    path = tmp_path / "epochs_fastflow_demo.json"
    for epochs in (1, 2):
        epoch_curve.main(epoch_curve.Options("fastflow_demo", epochs, results=tmp_path, smoke=True))
        result = json.loads(path.read_text())
        assert len(result["curves"]["jaxad"]["pixel_AUROC"]) == epochs
        result["curves"]["FrEIA"] = {"pixel_AUROC": [0.5]}
        path.write_text(json.dumps(result))
    assert set(json.loads(path.read_text())["curves"]) == {"jaxad", "FrEIA"}


def test_curve_stops_as_anomalib_does() -> None:
    values = [0.1, 0.3, 0.2, 0.1, 0.2, 0.9]
    stopped = epoch_curve.stopped
    assert (stopped(values, 3), stopped(values, 5), stopped(values[:1], 3)) == (0.3, 0.9, 0.1)


def test_curve_refuses_recipes_without_steps_or_with_other_blocks(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="8 3x3 couplings, got fastflow_demo"):
        epoch_curve.main(
            epoch_curve.Options("fastflow_demo", torch_python=Path("python"), results=tmp_path, smoke=True)
        )
    with pytest.raises(ValueError, match="learning rate, got patchcore_demo"):
        epoch_curve.main(epoch_curve.Options("patchcore_demo", results=tmp_path, smoke=True))


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_likelihoods_of_foreign_images(tmp_path: Path) -> None:
    names = ("RealNVP, cycle mask", "RealNVP on embeddings", "RealNVP on ADBench's embeddings")
    for part in (names[:1], names[1:]):
        nf_ood.main(nf_ood.Options(flows=part, train=64, test=8, hidden=2, results=tmp_path, smoke=True))
    flows = json.loads((tmp_path / "nf_ood.json").read_text())["flows"]
    assert tuple(flows) == names
    assert flows[names[0]]["bits_per_dimension"] > 7 and flows[names[1]]["bits_per_dimension"] is None
    assert set(flows[names[0]]["auroc"]) == {"one color", "digits", "tiles", "textures"}
    assert set(flows[names[2]]["auroc"]) == {"SVHN", "other classes of CIFAR-10"}
    assert all(0 <= value <= 1 for flow in flows.values() for value in flow["auroc"].values())


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_likelihoods_of_foreign_images_by_a_flow_of_aligned_images(tmp_path: Path) -> None:
    for kind in ("good", "crack", "dent"):
        (tmp_path / "bolt" / "test" / kind).mkdir(parents=True)
    name = "RealNVP, cycle mask"
    options = dict(train=16, test=8, hidden=2, aligned=tmp_path / "bolt", results=tmp_path, smoke=True)
    nf_ood.main(nf_ood.Options(flows=(name,), **options))
    result = json.loads((tmp_path / "nf_ood_bolt.json").read_text())
    assert result["foreign_images"] == {
        **dict.fromkeys(("one color", "digits", "tiles", "textures", "background", "CIFAR-10"), 8),
        "defects": 16,
    }
    assert set(result["flows"][name]["auroc"]) == set(result["foreign_images"])
    assert "flow, trained on bolt" in foreign_images(result)
    with pytest.raises(ValueError, match="bolt has no images"):
        nf_ood.resized(nf_ood.Options(), tmp_path / "bolt", 8)
    with pytest.raises(ValueError, match="flows must be of"):
        nf_ood.main(nf_ood.Options(flows=(nf_ood.ADBENCH,), **options))


@pytest.mark.slow
def test_method_is_fitted_to_vectors() -> None:
    """Also to those whose number does not fit into one byte."""
    x = np.random.default_rng(0).normal(size=(320, 4)).astype(np.float32)

    def init(key, state, frozen, spec):
        return jnp.zeros(spec["layer3"].shape)

    def update(key, state, frozen, batch):
        return state.at[batch.index].set(batch.x["layer3"]), {}

    method = Method(None, (Stage("copy", init, update),), None)
    np.testing.assert_array_equal(nf_ood.fit_vectors(method, x, "layer3").state, x)


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_ablation_of_generators(tmp_path: Path) -> None:
    names = ("confetti", "feature noise", "feature ascent")
    ablate_generators.main(ablate_generators.Options(generators=names, results=tmp_path, smoke=True))
    result = json.loads((tmp_path / "ablate_generators_demo.json").read_text())
    assert tuple(result["generators"]) == names
    for categories in result["generators"].values():
        assert len(categories) == 4
        for kinds in categories.values():
            assert "all" in kinds and "good" not in kinds and len(kinds) > 1
            assert all(0 <= row[metric] <= 1 for row in kinds.values() for metric in row)
    table = transfer(result)
    assert "| learned from | all | crack | dent |" in table and "| feature noise | " in table


def test_ablation_refuses_unknown_generators(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"generators must be of CutPaste, .*; got fog"):
        ablate_generators.main(ablate_generators.Options(generators=("fog",), results=tmp_path, smoke=True))


@pytest.mark.slow
def test_worth_of_known_parts(tmp_path: Path) -> None:
    known_parts.main(known_parts.Options(results=tmp_path, smoke=True))
    features = json.loads((tmp_path / "known_parts.json").read_text())["features"]
    assert set(features) == {"patches", "averages"}
    for row in features.values():
        assert row["known_normal_images"] == row["normal_images"] and 0 <= row["nearest_is_own"] <= 1


def test_neighbors_of_the_own_part_are_left_out() -> None:
    train, test = np.array([[[0.0]], [[4.0]], [[5.0]]]), np.array([[[0.5]], [[9.0]]])
    row = known_parts.compared(train, test, np.array(["a", "b", "c"]), np.array(["a", "b"]), np.array([0, 1]))
    assert (row["nearest_is_own"], row["with_own"], row["without_own"]) == (1.0, 1.0, 1.0)
    np.testing.assert_allclose(row["distance_ratio"], 0.5 / 3.5, rtol=1e-6)
    strange = known_parts.compared(train, test, np.array(["a", "b", "c"]), np.array(["c", "d"]), np.array([0, 1]))
    assert strange["nearest_is_own"] == 0 and strange["known_normal_images"] == 1


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_thresholds_on_new_parts(tmp_path: Path) -> None:
    new_parts.main(new_parts.Options(results=tmp_path, smoke=True))
    row = json.loads((tmp_path / "new_parts.json").read_text())["sets"]["rendered metal"]
    assert row["images"] == 36 and row["parts"] == 12
    told, not_told = row["told"], row["not_told"]
    assert told["held_out_groups"] == 2 and told["held_out_images"] == 6  # a fifth of the ten other parts
    assert not_told["held_out_groups"] == not_told["held_out_images"] == 6
    assert told["stated_average"] == pytest.approx(1 / 3) and not_told["stated_average"] == pytest.approx(1 / 7)


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_what_narrows_the_gap_to_new_tiles(tmp_path: Path) -> None:
    narrow_gap.main(narrow_gap.Options(results=tmp_path, smoke=True))
    tried = json.loads((tmp_path / "narrow_gap.json").read_text())["tried"]
    assert set(tried["padim"]) == {"nothing", "brightness", "mirrored", "own median"}
    assert set(tried["mahalanobis_ad"]) == {"nothing", "brightness", "mirrored"}
    rates = [value for rows in tried.values() for splits in rows.values() for row in splits for value in row.values()]
    assert len(rates) == 11 * 3 and all(0 <= rate <= 1 for rate in rates)


def test_images_are_scaled_to_one_brightness() -> None:
    gain = np.array([1, 2, 3])[:, None, None, None]
    images = (gain * np.random.default_rng(0).integers(20, 60, (3, 8, 8, 3))).astype(np.uint8)
    means = narrow_gap.bright(images).mean((1, 2, 3))
    np.testing.assert_allclose(means, 0.4 * 255, rtol=0.01)
    assert np.array_equal(narrow_gap.mirrored(images)[3:6], images[:, :, ::-1])


def test_tails_keep_a_rate_that_the_highest_score_misses(tmp_path: Path) -> None:
    tails.main(tails.Options(draws=20, results=tmp_path))
    rows = json.loads((tmp_path / "tails.json").read_text())["rows"]
    few = next(row for row in rows if row["images"] == 20 and row["target"] == 0.001)["rates"]["normal"]
    assert few["median"] < few["mean"] < few["highest_score"] < 0.1
