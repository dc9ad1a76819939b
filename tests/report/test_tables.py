import io
import json
import math

import pytest
from rich.console import Console

from jaxad.report.tables import Row, metrics_table, results_markdown, with_means

NAN = math.nan


def print_table(rows) -> list[str]:
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(metrics_table(rows))
    return console.export_text().splitlines()


def rows():
    return [
        Row("padim", "demo", "bolt", {"image_AUROC": 0.9, "pixel_AUROC": NAN}, {"pixel_AUROC": "no masks"}),
        Row("spade", "demo", "bolt", {"image_AUROC": 0.5, "pixel_AUROC": 0.25}),
        Row("padim", "demo", "[red]felt", {"image_AUROC": 0.8, "pixel_AUROC": 0.75}),
    ]


def test_only_groups_of_several_categories_have_a_mean():
    lines = list(with_means(rows()))
    assert [(row.method, row.category) for row, _ in lines] == [
        ("padim", "bolt"),
        ("padim", "[red]felt"),
        ("padim", "Mean"),
        ("spade", "bolt"),
    ]
    assert [is_mean for _, is_mean in lines] == [False, False, True, False]
    mean = lines[2][0]
    assert mean.metrics["image_AUROC"] == pytest.approx(0.85)
    assert math.isnan(mean.metrics["pixel_AUROC"])
    assert mean.reasons == {"pixel_AUROC": "no value for bolt"}


def test_a_metric_that_a_category_lacks_has_no_mean():
    lines = [Row("m", "d", "a", {"image_AUROC": 1.0, "pixel_AP": 0.5}), Row("m", "d", "b", {"image_AUROC": 0.0})]
    mean = next(row for row, is_mean in with_means(lines) if is_mean)
    assert mean.metrics["image_AUROC"] == 0.5 and math.isnan(mean.metrics["pixel_AP"])


def test_the_terminal_table_shows_means_and_reasons():
    lines = print_table(rows())
    text = "\n".join(lines)
    bolt = next(line for line in lines if "padim" in line and "bolt" in line)
    assert "0.900" in bolt and "–" in bolt
    mean = next(line for line in lines if "Mean" in line)
    assert "0.850" in mean and "–" in mean
    assert "[red]felt" in text and "– bolt pixel_AUROC: no masks" in text and "nan" not in text.lower()


def write_result(path, **fields):
    defaults = {"recipe": path.stem, "method": "padim", "dataset": "mtd", "category": "tile", "backbone": "resnet50"}
    path.write_text(json.dumps(defaults | fields))


def test_the_markdown_table_shows_measured_and_published_metrics(tmp_path):
    write_result(
        tmp_path / "b.json",
        metrics={"image_AUROC": {"mean": 0.93456, "std": 0.0}, "pixel_AUROC": {"mean": None}},
        published={"image_AUROC": {"value": 0.9, "source": "PaDiM, Table 1 | a"}, "pixel_AUROC": {"value": 0.95}},
    )
    write_result(
        tmp_path / "a.json",
        method="spade",
        metrics={"image_AUROC": {"mean": 0.8, "std": 0.012}},
        published={"image_AUROC": {"value": 0.868, "source": "IM-IAD"}},
    )
    write_result(tmp_path / "c.json", dataset="demo", category=None, metrics={}, published=None)
    (tmp_path / "bench_knn.json").write_text("not even json")
    lines = results_markdown(tmp_path).splitlines()
    metrics = ("image_AUROC", "pixel_AUROC", "pixel_AP", "pixel_AUPRO")
    header = f"| recipe | backbone | {' | published | '.join(metrics)} | published | fit, CPU seconds |"
    assert lines == [
        header,
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| `c` | resnet50 | – | – | – | – | – | – | – | – | – |",
        "| `b` | resnet50 | 0.935 | 0.900 [1] | – | 0.950 | – | – | – | – | – |",
        "| `a` | resnet50 | 0.800 ± 0.012 | 0.868 [2] | – | – | – | – | – | – | – |",
        "",
        "1. PaDiM, Table 1 | a",
        "2. IM-IAD",
    ]
    today = {"b": {"pixel_AUROC": {"value": 0.97, "source": "paper"}}, "c": {}}
    lines = results_markdown(tmp_path, published=today).splitlines()
    assert "| `b` | resnet50 | 0.935 | – | – | 0.970 [1] | – | – | – | – | – |" in lines
    assert "| `a` | resnet50 | 0.800 ± 0.012 | 0.868 [2] | – | – | – | – | – | – | – |" in lines


@pytest.mark.parametrize("text", ["{", "[]", '{"method": "padim"}'])
def test_the_error_names_a_damaged_result(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json"):
        results_markdown(tmp_path)
