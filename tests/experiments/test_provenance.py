"""The hash of a method's code changes with what the method uses, and with nothing else."""

import json
from pathlib import Path

import pytest

from experiments.provenance import DECISIVE, STUDENTS, code_hash, is_current, parse
from experiments.recipes import all_recipes
from jaxad import methods

METHOD = '''
"""A method."""
import pack.ops.far as far
from pack.ops import near as close
from pack.ops import sharpen
CHOICE = sharpen


def tiny(x: int):
    from pack.ops.lazy import late

    return close(x) + far.away.LIMIT + late(x)
'''
NEAR = """
def near(x):
    # how near
    return helper(x)


def helper(x):
    return x + 1


def unrelated(x):
    return x
"""
FILES = {
    "methods/tiny.py": METHOD,
    "methods/other.py": "def other():\n    return 1\n",
    "ops/__init__.py": "from pack.ops.nearest import near, helper\nfrom pack.ops.sharp import sharpen\n",
    "ops/nearest.py": NEAR,
    "ops/sharp.py": "import re\n\nPATTERNS = {}\n\n\ndef sharpen(x):\n    return x\n\n\nPATTERNS['a'] = re.I\n",
    "ops/far/__init__.py": "",
    "ops/far/away.py": "LIMIT = [len(word) for word in 'abc']\nOTHER = 2\n",
    "ops/lazy.py": "def late(x):\n    return x\n",
}


def hash_with(tmp_path: Path, file: str = "", old: str = "", new: str = "") -> str:
    """The hash of the tiny method, in a package of which one file differs."""
    package = tmp_path / str(len(list(tmp_path.iterdir()))) / "pack"
    for name, text in FILES.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        assert name != file or old in text
        path.write_text(text.replace(old, new) if name == file else text)
    return code_hash("tiny", package=package)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("methods/tiny.py", "late(x)\n", "late(-x)\n"),
        ("ops/nearest.py", "x + 1", "x + 2"),
        ("ops/far/away.py", "'abc'", "'abcd'"),
        ("ops/lazy.py", "return x", "return -x"),
        ("ops/sharp.py", "re.I", "re.M"),
        ("ops/__init__.py", "import near, helper", "import helper as near"),
    ],
)
def test_what_a_method_uses_counts(tmp_path: Path, file: str, old: str, new: str) -> None:
    assert hash_with(tmp_path, file, old, new) != hash_with(tmp_path)


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("methods/other.py", "1", "2"),
        ("ops/nearest.py", "def unrelated(x):\n    return x", "def unrelated(x):\n    return -x"),
        ("ops/nearest.py", "# how near", '"""How near."""'),
        ("ops/nearest.py", "def near(x):", "def near(x: int, ) -> int:"),
        ("ops/far/away.py", "OTHER = 2", "OTHER = 3"),
        ("methods/tiny.py", "A method", "The method"),
    ],
)
def test_nothing_else_counts(tmp_path: Path, file: str, old: str, new: str) -> None:
    assert hash_with(tmp_path, file, old, new) == hash_with(tmp_path)


def test_every_method_has_its_own_hash_with_each_family_of_backbones() -> None:
    assert len({code_hash(name) for name in methods.names()}) == len(methods.names())
    small, large, other = (code_hash("padim", name) for name in ("resnet18", "resnet50.tv_in1k", "vgg16"))
    assert small == large != other
    assert code_hash("padim", "resnet50.caffe_in1k") != large  # images are normalized in another way
    assert code_hash("padim", ("resnet18",)) == small and code_hash("padim", None) == code_hash("padim")


def test_a_result_is_current_until_code_or_recipe_change() -> None:
    recipe = all_recipes()["patchcore_mtd"]
    fields = {field: getattr(recipe, field) for field in DECISIVE}
    result = json.loads(json.dumps(fields | {"code": code_hash(recipe.method, recipe.backbone)}, default=dict))
    assert is_current(result, recipe) and is_current(result, recipe._replace(notes="otherwise"))
    assert not is_current(result | {"code": "0" * 16}, recipe) and not is_current(fields, recipe)
    assert not is_current(result, recipe._replace(seeds=(0, 1, 2, 3, 4))) and not is_current(result, None)


def test_how_a_family_makes_students_counts_for_methods_that_train_one():
    module = parse(
        "def make():\n    def student():\n        return norm\n    return build(student)\nnorm = build = 1\n"
    )
    assert "norm" in module.definitions[STUDENTS].references and "norm" not in module.definitions["make"].references
    assert STUDENTS not in parse("def student():\n    return 1\n").definitions
