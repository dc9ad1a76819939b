"""The report on synthetic run directories, parsed and rendered in a browser."""

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binomtest

from jaxad.metrics.threshold import (
    Thresholds,
    conformal_threshold,
    manual_threshold,
    oracle_threshold,
    pair_to_json,
    to_json,
)
from jaxad.report.charts import roc
from jaxad.report.examples import Examples, choose_examples, save_examples
from jaxad.report.html import OPEN_RUNS, write_report
from jaxad.report.runs import write_metrics, write_recipe

HOSTILE = "test/<script>alert(1)</script>&\"'.png"
VOID = {"meta", "img", "br", "wbr", "path", "circle"}


def make_run(
    folder: Path,
    method: str = "padim",
    category: str = "bolt",
    *,
    labels: bool = True,
    threshold: str | None = "held-out",
    masks: bool = True,
    maps: bool = True,
    scored: bool = True,
) -> Path:
    """Writes a run directory like the command line does."""
    run_dir = folder / method / "demo" / category
    run_dir.mkdir(parents=True)
    rng = np.random.default_rng(len(category))
    truth = np.repeat([0, 1], [30, 20])
    scores = (rng.normal(size=50) + 2 * truth).round(3)
    image_threshold = {
        "held-out": conformal_threshold(np.linspace(-2, 2, 10), 0.1),
        "oracle": oracle_threshold(scores, truth),
        "manual": manual_threshold(0.75),
        None: None,
    }[threshold]
    recipe = {
        "method": method,
        "dataset": "demo",
        "category": category,
        "hyperparameters": {"n_features": 100, "layers": ["layer1", "layer2"]},
        "backbone": "resnet18",
        "weights": {"path": "w.safetensors", "sha256": "0a1b" * 16},
        "preprocess": {"resize": [32, 32], "center_crop": None},
        "command": f"jaxad fit --method {method} <demo>",
        "seed": 7,
        "versions": {"jaxad": "0.1.0"},
        "device": "cpu",
        "seconds": {"compile": 1.25, "fit": 630.0, "score_per_image": 0.0125},
        "images_per_second": 80.0,
        "peak_bytes": 1_500_000_000,
        "n_train": 40,
        "n_heldout": 10,
        "loss": [] if method == "padim" else [3.0, 1.5, -0.25, -0.5],
    }
    write_recipe(run_dir, recipe)
    if not scored:
        return run_dir
    fields = None if image_threshold is None else to_json(image_threshold)
    pixel = to_json(manual_threshold(0.5)) if image_threshold is not None and maps else None
    (run_dir / "threshold.json").write_text(json.dumps({"image": fields, "pixel": pixel}))
    known_labels = truth if labels else np.full(50, -1)
    lines = ["path,label,defect,score,prediction"]
    lines += [f"{i}.png,{known_labels[i] if labels else ''},good,{scores[i]},0" for i in range(50)]
    (run_dir / "scores.csv").write_text("\n".join(lines) + "\n")
    indices = choose_examples(scores, known_labels, None if image_threshold is None else image_threshold.value)
    mask = np.zeros((8, 32, 32), bool)
    mask[:4, 8:20, 8:20] = True
    examples = Examples(
        image=rng.integers(0, 256, (8, 32, 32, 3), np.uint8),
        path=[HOSTILE, *(f"test/{i}.png" for i in indices[1:])],
        label=known_labels[indices],
        score=scores[indices],
        mask=mask if masks else None,
        map=rng.random((8, 32, 32), np.float32) if maps else None,
    )
    save_examples(run_dir, examples)
    if labels:
        metrics = {"image_AUROC": 0.91234, "pixel_AUROC": 0.87 if masks else None}
        reasons = {} if masks else {"pixel_AUROC": 'no "masks"'}
        write_metrics(run_dir, {"metrics": metrics, "reasons": reasons, "oracle": False})
    return run_dir


def set_by_hand(run_dir: Path, **values: float) -> None:
    pair = Thresholds(**{"image": None, "pixel": None} | {kind: manual_threshold(v) for kind, v in values.items()})
    (run_dir / "threshold.json").write_text(json.dumps(pair_to_json(pair)))


class Page(HTMLParser):
    """The tags and the visible text of a page. Fails if tags are not nested correctly."""

    def __init__(self, source: str):
        super().__init__()
        self.tags, self.open, self.words = [], [], []
        self.feed(source)
        self.close()
        assert not self.open, f"not closed: {self.open}"
        self.text = " ".join(" ".join(self.words).replace("\u00a0", " ").split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open and self.open.pop() == tag, f"</{tag}> does not match the open tag"

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    def all(self, tag, **attributes):
        required = {name.rstrip("_"): value for name, value in attributes.items()}
        return [present for name, present in self.tags if name == tag and required.items() <= present.items()]


def report(tmp_path, *run_dirs) -> Page:
    out = write_report(run_dirs, tmp_path / "out" / "report.html")
    assert [path.name for path in out.parent.iterdir()] == ["report.html"]
    return Page(out.read_text(encoding="utf-8"))


def test_the_page_is_complete_and_self_contained(tmp_path):
    page = report(tmp_path, make_run(tmp_path), make_run(tmp_path, category="felt", masks=False))
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "iframe", "object"}
        for name in ("src", "href", "srcset", "data", "style"):
            value = attributes.get(name) or ""
            assert "//" not in value.partition(",")[0] and "url(" not in value
        if "src" in attributes:
            assert tag == "img" and attributes["src"].startswith("data:image/")
    assert "url(" not in (tmp_path / "out" / "report.html").read_text().partition("</style>")[0]
    for text in (
        *("Mean", "0.912", "Metrics", "ROC", "AUROC", "threshold", "anomaly score", "false positive rate"),
        *(
            "held-out normals, false-positive rate 10 %, n = 10",
            "at most 9.09 % false alarms on average over hold-outs",
        ),
        *("1.25 s", "10.5 min", "80 images/s", "12.5 ms", "1.5 GB", "0a1b" * 16, "n_features 100", "Seed 7"),
        *("jaxad fit --method padim <demo>", "layer1, layer2", "missed defect", "false alarm", "resize 32, 32"),
    ):
        assert text in page.text, text
    assert "ORACLE" not in page.text and "nan" not in page.text.lower()
    assert len(page.all("svg")) == 4
    assert len(page.all("figure", class_="example")) == 16
    columns = ("image", "mask", "heat map", "contour")
    assert [len(page.all("span", class_="cell", **{"data-name": name})) for name in columns] == [16, 8, 16, 16]
    titles = [attributes["title"] for attributes in page.all("abbr")]
    assert titles == ['no "masks"', "no value for felt"]
    assert len(page.all("details", open=None)) == 2


def test_file_names_are_escaped(tmp_path):
    page = report(tmp_path, make_run(tmp_path, category="\x1b[31m<img src=x onerror=alert(1)>"))
    assert not page.all("script") and not page.all("img", src="x")
    assert HOSTILE.replace("/", "/ ") in page.text  # as text that may wrap after each slash
    assert "\\x1b[31m<img src=x onerror=alert(1)>" in page.text


def test_confusion_counts_follow_the_threshold(tmp_path):
    run_dir = make_run(tmp_path, threshold="manual")
    table = np.genfromtxt(run_dir / "scores.csv", delimiter=",", names=True, dtype=None, encoding="utf-8")
    predicted, truth = table["score"] > 0.75, table["label"] == 1
    page = report(tmp_path, run_dir)
    assert f"{(predicted & ~truth).sum()} of 30 good images raise a false alarm" in page.text
    assert f"{(~predicted & truth).sum()} of 20 defects are missed" in page.text
    assert f"good {(~predicted & ~truth).sum()} {(predicted & ~truth).sum()} anomalous" in page.text
    assert "Threshold: edited by hand; no guarantee." in page.text


def test_rates_at_the_threshold_have_intervals_also_for_each_defect(tmp_path):
    run_dir = make_run(tmp_path)
    lines = (run_dir / "scores.csv").read_text().splitlines()
    rows = [line.split(",") for line in lines[1:]]
    rows = [
        [path, label, f"<b>{i % 2}" if label == "1" else "good", *rest]
        for i, (path, label, _, *rest) in enumerate(rows)
    ]
    (run_dir / "scores.csv").write_text("\n".join([lines[0], *map(",".join, rows)]))
    metrics = json.loads((run_dir / "metrics.json").read_text())
    rate = {"threshold": 0.5, "FPR": {"value": 0.2, "low": 0.08, "high": 0.39, "n": 30}}
    write_metrics(run_dir, {"metrics": metrics["metrics"], "at_threshold": {"image": None, "pixel": rate}})
    for value in (0.75, 1.5):
        set_by_hand(run_dir, image=value, pixel=0.5)
        page = report(tmp_path, run_dir)
        for name, kept in (
            ("FPR", [row for row in rows if row[1] == "0"]),
            ("recall", [row for row in rows if row[1] == "1"]),
            ("recall of <b>0", [row for row in rows if row[2] == "<b>0"]),
        ):
            count = sum(float(row[3]) > value for row in kept)
            interval = binomtest(count, len(kept)).proportion_ci(method="exact")
            assert f"{name} {count / len(kept):.3f} {interval.low:.3f}–{interval.high:.3f} {len(kept)}" in page.text
        assert "FPR of the pixel threshold 0.200 0.080–0.390 30" in page.text
    set_by_hand(run_dir, image=0.75, pixel=0.6)
    assert "FPR of the pixel threshold" not in report(tmp_path, run_dir).text  # it was that of another threshold


def test_too_few_held_out_images_are_told(tmp_path):
    run_dir = make_run(tmp_path)
    few = to_json(conformal_threshold(np.arange(10.0), 0.01))
    (run_dir / "threshold.json").write_text(json.dumps({"image": few, "pixel": None}))
    text = report(tmp_path, run_dir).text
    assert "25.9 % with 95 % confidence in this one. 1 % false alarms need 99 held-out images, got 10" in text


def test_an_oracle_is_marked(tmp_path):
    page = report(tmp_path, make_run(tmp_path, threshold="oracle"))
    assert page.text.count("ORACLE: chosen on the test set") == 2
    assert len(page.all("span", class_="badge")) == 2


def test_a_run_without_thresholds(tmp_path):
    page = report(tmp_path, make_run(tmp_path, threshold=None))
    assert "No threshold" in page.text and "false alarm" not in page.text and not page.all("table", class_="confusion")
    assert not page.all("span", **{"data-name": "contour"}) and not page.all("circle")
    assert "AUROC" in page.text and "Lowest scores of defects" in page.text


@pytest.mark.parametrize("threshold", ["held-out", None])
def test_a_run_without_labels_masks_and_maps(tmp_path, threshold):
    page = report(tmp_path, make_run(tmp_path, labels=False, masks=False, maps=False, threshold=threshold))
    assert "Metrics" not in page.text and "ROC" not in page.text and "unlabeled" in page.text
    assert ("images are predicted anomalous" in page.text) == (threshold is not None)
    assert len(page.all("span", class_="cell")) == 8 and "Highest scores" in page.text


def test_a_run_that_has_not_been_evaluated(tmp_path):
    page = report(tmp_path, make_run(tmp_path, scored=False))
    assert "n_features" in page.text and not page.all("svg") and not page.all("img")


def test_links_of_the_grouped_table_lead_to_the_right_run(tmp_path):
    runs = [("padim", "bolt"), ("spade", "bolt"), ("padim", "felt")]
    page = report(tmp_path, *(make_run(tmp_path, *run) for run in runs))
    assert [link["href"] for link in page.all("a")] == ["#run-0", "#run-2", "#run-1"]
    titles = [page.text.index(f"{method} · {category}") for method, category in runs]
    assert titles == sorted(titles)


def test_many_runs_start_collapsed(tmp_path):
    page = report(tmp_path, *(make_run(tmp_path, category=f"c{i}") for i in range(OPEN_RUNS + 1)))
    assert len(page.all("details")) == OPEN_RUNS + 1 and not page.all("details", open=None)
    assert {link["href"] for link in page.all("a")} == {f"#run-{i}" for i in range(OPEN_RUNS + 1)}
    assert [len(page.all("div", id=f"run-{i}")) for i in range(OPEN_RUNS + 1)] == [1] * (OPEN_RUNS + 1)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("recipe.json", "{", "recipe.json must be JSON"),
        ("threshold.json", '{"image": {"value": "high"}, "pixel": null}', "threshold.json: a threshold lacks fpr"),
        ("scores.csv", "path,score\na,high\n", "scores.csv must have a score and a label"),
        ("scores.csv", "path,label\na,1\n", "scores.csv must have a score and a label"),
        (
            "scores.csv",
            "path,label,score\na,1,0.5\nb,1,inf\n",
            "line 3 of .*scores.csv must .* got inf",
        ),
    ],
)
def test_the_error_names_a_damaged_file(tmp_path, file, content, message):
    run_dir = make_run(tmp_path, labels=False)
    (run_dir / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        write_report([run_dir], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_missing_runs_are_reported(tmp_path):
    with pytest.raises(ValueError, match="at least one run directory"):
        write_report([], tmp_path / "report.html")
    with pytest.raises(FileNotFoundError, match=r"recipe\.json"):
        write_report([tmp_path], tmp_path / "report.html")


def test_the_roc_area_is_the_probability_of_the_right_order():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 300)
    scores = (rng.normal(size=300) + labels).round(1)  # with ties
    normal, anomalous = scores[labels == 0], scores[labels == 1]
    expected = (np.greater.outer(anomalous, normal) + 0.5 * np.equal.outer(anomalous, normal)).mean()
    curve = roc(scores, labels)
    assert curve.area == pytest.approx(expected, abs=1e-12)
    assert curve.true_positive_rate[[0, -1]].tolist() == curve.false_positive_rate[[0, -1]].tolist() == [0, 1]
    perfect = roc(np.arange(1000.0), np.repeat([0, 1], 500))
    assert perfect.area == 1 and len(perfect.true_positive_rate) == 3


def test_charts_accept_constant_scores_and_a_distant_threshold(tmp_path):
    run_dir = make_run(tmp_path, threshold="manual", labels=False)
    for threshold in (0.5, 1000.0):
        (run_dir / "scores.csv").write_text("path,label,score\na,0,0.5\nb,1,0.5\n")
        set_by_hand(run_dir, image=threshold)
        page = report(tmp_path, run_dir)
        assert "AUROC 0.500" in page.text and f"threshold {threshold:g}" in page.text


def browse(page, folder, *flags) -> str:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    options = "--disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update"
    command = [chromium, "--headless", "--no-sandbox", *options.split(), "--disable-sync", "--hide-scrollbars"]
    command += [f"--user-data-dir={folder}", *flags, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout


def test_the_page_renders_in_a_browser(tmp_path):
    page = write_report([make_run(tmp_path), make_run(tmp_path, "spade", threshold="oracle")], tmp_path / "report.html")
    screenshot = tmp_path / "screenshot.png"
    browse(page, tmp_path / "profile1", f"--screenshot={screenshot}", "--window-size=1300,3000")
    with Image.open(screenshot) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape == (3000, 1300, 3)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 500  # photographs, not a blank or an error page
    assert (pixels[:1500].std((1, 2)) > 0).mean() > 0.5
    dom = Page(browse(page, tmp_path / "profile2", "--dump-dom"))
    assert len(dom.all("svg")) == 5 and len(dom.all("figure", class_="example")) == 16
    assert "ORACLE: chosen on the test set" in dom.text and not dom.all("script")
