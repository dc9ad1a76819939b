"""The house rules of docs/design.md: what is where, what may import what, and how a method presents itself."""

import ast
import importlib
import inspect
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxad.base import Method
from jaxad.methods import METHODS
from tests.cases import CASES

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "jaxad"
SOURCES = sorted(PACKAGE.rglob("*.py"))
HEADINGS = ("Family:", "Paper:", "Reference:", "Differences:", "Results:")
FAMILIES = {
    *("features", "flows", "distillation", "synthetic"),
    *("reconstruction", "one-class", "self-supervised", "classical"),
}

BELOW_METHODS = {"base", "ops", "nn", "bijectors", "backbones", "training", "synthesis"}
BELOW_SETTINGS = {"base", "backbones", "data", "driver", "methods"}
BELOW_DETECTOR = BELOW_SETTINGS | {"settings", "learning", "metrics", "artifact", "files", "text"}
MAY_IMPORT = {
    "base": set(),
    "ops": {"base"},
    "nn": {"base", "ops"},
    "bijectors": {"base", "ops"},
    "backbones": {"base", "ops", "nn"},
    "training": {"base"},
    "synthesis": {"base", "ops"},
    "methods": BELOW_METHODS,
    "data": {"host_memory"},
    "host_memory": set(),
    "interruption": set(),
    "streams": set(),
    "schema": set(),
    "text": set(),
    "metrics": {"schema"},
    "files": {"interruption", "schema"},
    "progress": {"interruption", "text"},
    "artifact": {"base", "files", "schema"},
    "driver": {"base", "data", "host_memory"},
    "settings": BELOW_SETTINGS,
    "learning": BELOW_SETTINGS | {"settings", "metrics"},
    "detector": BELOW_DETECTOR,
    "report": {"artifact", "files", "data", "metrics", "schema", "text"},
    "runs": BELOW_DETECTOR | {"detector", "interruption", "progress", "report", "jaxad"},
    "cli": BELOW_DETECTOR | {"detector", "interruption", "streams", "progress", "report", "runs", "jaxad"},
    "__main__": {"cli", "interruption", "streams", "jaxad"},
    "__init__": {"detector", "driver", "data", "methods"},
}
"""The parts of jaxad that each part may import besides itself; `jaxad` stands for the public names."""
NO_METHOD_NAMES = {"jaxad.ops.sharding", "jaxad.ops.lapack"}
"""What is below the operations: methods know no devices."""
MAX_LINES = 400


def modules() -> Iterator[tuple[Path, ast.Module]]:
    for path in SOURCES:
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(module: ast.Module) -> Iterator[str]:
    """The modules of jaxad that a file imports anywhere, as dotted names."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "jaxad")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{ast.unparse(node)}: imports are absolute"
            if node.module == "jaxad":
                yield from (f"jaxad.{alias.name}" for alias in node.names)
            elif node.module and node.module.startswith("jaxad."):
                yield node.module


def test_imports_run_downward():
    wrong = []
    for path, module in modules():
        part = part_of(path)
        for name in imports(module):
            target = [*name.split("."), "jaxad"][1]
            if target != part and target not in MAY_IMPORT[part]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_methods_do_not_import_each_other():
    for path, module in modules():
        if part_of(path) == "methods" and path.name != "__init__.py":
            assert not [name for name in imports(module) if name.startswith("jaxad.methods")], path


def test_methods_know_no_devices():
    for path, module in modules():
        if part_of(path) == "methods":
            assert not NO_METHOD_NAMES & set(imports(module)), path


def test_no_source_file_is_long():
    sources = [*SOURCES, *(ROOT / "experiments").rglob("*.py")]
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in sources}
    assert {path: length for path, length in lengths.items() if length > MAX_LINES} == {}


def test_every_directory_with_code_is_a_package():
    for path in SOURCES:
        assert (path.parent / "__init__.py").is_file(), path


def test_no_module_for_leftovers():
    for path in SOURCES:
        names = {part.removesuffix(".py") for part in path.parts}
        assert not names & {"utils", "util", "common", "helpers", "misc", "_src"}


def test_public_functions_say_what_they_are():
    """Annotations on every argument and result, a docstring on every public function, method and class."""
    wrong = []
    for path, module in modules():
        owners = [module, *(n for n in module.body if isinstance(n, ast.ClassDef) and not n.name.startswith("_"))]
        assert ast.get_docstring(module) or not module.body, f"{path} has no docstring"
        for owner in owners:
            if isinstance(owner, ast.ClassDef) and not ast.get_docstring(owner):
                wrong.append(f"{path.relative_to(ROOT)}: {owner.name} has no docstring")
            for node in owner.body:
                if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                    continue
                where = f"{path.relative_to(ROOT)}: {node.name}"
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
                if bare or node.returns is None:
                    wrong.append(f"{where} lacks annotations ({', '.join(bare) or 'of the result'})")
                if not ast.get_docstring(node):
                    wrong.append(f"{where} has no docstring")
    assert not wrong


def test_a_method_is_complete():
    """A file, a row in tests/cases.py and a recipe: all three, or none."""
    files = {path.stem for path in (PACKAGE / "methods").glob("*.py")} - {"__init__"}
    assert files == set(METHODS)
    rows = {case.method for case in CASES.values()}
    assert rows == files, f"tests/cases.py needs a row for {files - rows}, and none for {rows - files}"
    assert list(METHODS) == sorted(METHODS)


def test_a_method_has_a_recipe():
    names = [path.stem for path in (ROOT / "experiments" / "recipes").glob("*.py") if path.name != "__init__.py"]
    recipes = [r for name in names for r in importlib.import_module(f"experiments.recipes.{name}").RECIPES.values()]
    methods = {recipe.method for recipe in recipes}
    assert methods == set(METHODS), f"experiments/recipes needs a recipe for {set(METHODS) - methods}"


@pytest.mark.parametrize("name", METHODS)
def test_a_method_presents_itself(name):
    text = importlib.import_module(f"jaxad.methods.{name}").__doc__
    places = [text.find(f"\n{heading} ") for heading in HEADINGS]
    assert min(places) > 0 and places == sorted(places), f"the headings must be {HEADINGS}, in this order"
    family, paper, _, differences, results = (
        text[start:end].split(":", 1)[1].strip() for start, end in zip(places, [*places[1:], None], strict=True)
    )
    assert re.search(r"arXiv:\d{4}\.\d{4,5}|doi\.org/\S+|https://\S+", paper)
    assert family in FAMILIES, f"Family: must be one of {sorted(FAMILIES)}, or a new one there"
    assert differences
    recipe = re.match(r"\S+\.py", results)
    assert recipe and (ROOT / recipe[0]).is_file(), results
    assert name in (ROOT / recipe[0]).read_text()


@pytest.mark.parametrize("name", METHODS)
def test_a_factory_is_keyword_only(name):
    factory, text = METHODS[name], inspect.getdoc(METHODS[name])
    assert factory.__name__ == name and factory.__module__ == f"jaxad.methods.{name}"
    for parameter in inspect.signature(factory).parameters.values():
        assert parameter.kind is parameter.KEYWORD_ONLY and parameter.default is not parameter.empty, parameter
        assert re.search(rf"^ +{parameter.name}: \S", text, re.MULTILINE), f"{parameter} is not described"
    assert "Raises:\n    ValueError: " in text
    assert isinstance(factory(), Method)  # the paper's defaults make one


def tracked() -> Iterator[tuple[Path, str]]:
    """The text files that belong to the project."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("needs the git checkout, to tell the project's files from others")
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if path.is_file() and path.stat().st_size < 1 << 20:
            content = path.read_bytes()
            if b"\0" not in content:
                yield path, content.decode("utf-8")


def test_nothing_names_this_machine():
    """No absolute paths of somebody's machine, and no package index but the installer's own."""
    machine = re.compile(r"(?<![\w.:/])/(?:work|home|root|Users|tmp|mnt|opt)/\w+|[A-Z]:\\\\?Users")
    index = re.compile(
        r"index[-_]url|pypi\.org|artifact[o]ry|jfr[o]g|devp[i]|find[-_]links|https?://[^/\s]*(?:pypi|registry|proxy)"
    )
    wrong = []
    for path, text in tracked():
        for number, line in enumerate(text.splitlines(), 1):
            for match in (machine.search(line), index.search(line.lower())):
                if match:
                    wrong.append(f"{path.relative_to(ROOT)}:{number}: {match[0]}")
    assert not wrong


@pytest.mark.skipif("PYTEST_XDIST_WORKER" not in os.environ, reason="there is one process")
@pytest.mark.parametrize("name", ["padim"])
def test_rows_of_the_conformance_table_are_groups_of_xdist(name, request):
    """Else each is fitted in every process, without a word, and the suite is slow."""
    assert request.node.nodeid.endswith(f"@{name}")
