"""Which code made a result, and is it today's: a hash of what a method computes with, read from the sources."""

import ast
import functools
import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments.command import ROOT
from experiments.recipes import Recipe
from jaxad.backbones import backbone, registry

TABLES = {"jaxad.backbones.networks.FAMILIES", "jaxad.backbones.registry.ENTRIES", "jaxad.backbones.registry.PLAIN"}
"""Tables of all backbones. They lead nowhere: of them only what a result was made with counts."""
UNNAMED = "<statements>"
"""What stands in a module and binds no name."""
STUDENTS, STUDENT = "<students>", "jaxad.backbones.networks.student"
"""How a module makes untrained networks of a backbone's architecture; and the function by which a method gets one."""


DECISIVE = ("method", "dataset", "backbone", "hyperparameters", "image_size", "center_crop", "seeds")
"""What a result has of its recipe, and what decides its numbers."""


class Definition(NamedTuple):
    """What a name means at the top level of a module."""

    text: str
    """Its syntax tree, the same for all versions of Python."""
    references: frozenset[str]
    """The dotted names in it that the module defines or imports: `knn`, `registry.lookup`."""


class Module(NamedTuple):
    """What the source of a module defines, and what it imports, in functions too."""

    definitions: dict[str, Definition]
    imports: dict[str, str]
    """Name -> what it stands for: `nn` -> `flax.linen`."""


def is_current(result: Mapping[str, Any], recipe: Recipe | None) -> bool:
    """Whether a result was measured with today's code and by its recipe as it is today; None: that is gone."""
    if recipe is None:
        return False
    today = {field: getattr(recipe, field) for field in DECISIVE}
    today = json.loads(json.dumps(today, default=dict)) | {"code": code_hash(recipe.method, recipe.backbone)}
    return all(result.get(field) == value for field, value in today.items())


@functools.cache
def code_hash(method: str, backbones: str | tuple[str, ...] | None = (), package: Path = ROOT / "jaxad") -> str:
    """A hash of a method's code: of all that its file defines, and of every definition that this leads to by name.

    Only the definitions that are used count, not the rest of their files. Docstrings, comments, annotations and layout
    do not count. Of the backbones, the families and the normalization of images count, and how they make students if
    the method trains one.

    Names are followed through imports, re-exports and attributes of modules, but not through `getattr`, strings or
    arguments. The driver, which calls the methods, the readers of images, the metrics and libraries do not count.

    Args:
        method: Its name.
        backbones: The names of the backbones that it is used with.
        package: The folder with the code; its files are read once in a process, like those that are imported.
    """
    home = f"{package.name}.methods.{method}"
    entries = [registry.lookup(name) for name in ([backbones] if isinstance(backbones, str) else backbones or ())]
    families = [f"jaxad.backbones.{backbone(entry.name).family}" for entry in entries]
    pending = [home, *(f"{family}.FAMILY" for family in families)]
    reached: dict[str, str] = {}
    while pending:
        for module, name in resolve(pending.pop(), package):
            key = f"{module}.{name}"
            if key in reached or key in TABLES:
                continue
            definition = module_at(module, package).definitions[name]
            reached[key] = definition.text
            if key == STUDENT:
                pending += [f"{family}.{STUDENTS}" for family in families]
            pending += [f"{module}.{reference}" for reference in (UNNAMED, *sorted(definition.references))]
    text = [*sorted(reached.items()), *((entry.normalization, entry.stride_in_1x1) for entry in entries)]
    return hashlib.sha256(repr(text).encode()).hexdigest()[:16]


@functools.cache
def resolve(name: str, package: Path) -> list[tuple[str, str]]:
    """The module and the name in it that a dotted name stands for; of a module all names, of other things none."""
    module, rest = name, []
    while not path_of(module, package):
        module, _, last = module.rpartition(".")
        rest.insert(0, last)
        if not module:
            return []
    definitions, imports = module_at(module, package)
    if not rest:
        return [(module, each) for each in definitions]
    if rest[0] in definitions:
        return [(module, rest[0])]
    return resolve(".".join([imports[rest[0]], *rest[1:]]), package) if rest[0] in imports else []


@functools.cache
def path_of(module: str, package: Path) -> Path | None:
    """The file of a module of the package; None if there is none."""
    path = package.parent.joinpath(*module.split("."))
    paths = (path.with_suffix(".py"), path / "__init__.py") if path.is_relative_to(package) else ()
    return next((path for path in paths if path.is_file()), None)


@functools.cache
def module_at(module: str, package: Path) -> Module:
    """A module of the package."""
    path = path_of(module, package)
    assert path is not None
    return parse(path.read_text(encoding="utf-8"))


def parse(source: str) -> Module:
    """Reads the source of a module."""
    tree = ast.parse(source)
    imports, statements = {}, defaultdict(list)
    for node in ast.walk(tree):
        strip(node)
        if isinstance(node, ast.Import):
            names = ((a.asname, a.name) if a.asname else (head(a.name), head(a.name)) for a in node.names)
            imports |= dict(names)
        elif isinstance(node, ast.ImportFrom):
            imports |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef):
            students = [s for s in statement.body if isinstance(s, ast.FunctionDef) and s.name == "student"]
            statement.body[:] = [s for s in statement.body if s not in students]
            for student in students:
                statements[STUDENTS].append(student)
        if not isinstance(statement, ast.Import | ast.ImportFrom):
            for name in bound(statement) or {UNNAMED}:
                statements[name].append(statement)
    known = statements.keys() | imports.keys()
    definitions = {
        name: Definition(dump(parts), frozenset(n for part in parts for n in references(part) if head(n) in known))
        for name, parts in statements.items()
    }
    return Module(definitions, imports)


def head(name: str) -> str:
    """The first part of a dotted name."""
    return name.partition(".")[0]


def strip(node: ast.AST) -> None:
    """Removes what computes nothing: annotations and docstrings, of attributes too."""
    for field in ("annotation", "returns"):
        if hasattr(node, field):
            setattr(node, field, None)
    body = getattr(node, "body", None)
    if isinstance(body, list):
        body[:] = [s for s in body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]


def bound(statement: ast.stmt) -> set[str]:
    """The names that a statement binds; those within a comprehension are its own."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name}
    comprehensions = [node.target for node in ast.walk(statement) if isinstance(node, ast.comprehension)]
    return stored(statement) - set().union(*map(stored, comprehensions))


def stored(node: ast.AST) -> set[str]:
    """The variables in a syntax tree that get a value."""
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def references(node: ast.AST) -> Iterator[str]:
    """The dotted names in a syntax tree."""
    name = dotted(node)
    if name:
        yield name
        return
    for child in ast.iter_child_nodes(node):
        yield from references(child)


def dotted(node: ast.AST) -> str | None:
    """The text of a name, or of attributes of a name; None for everything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := dotted(node.value)):
        return f"{base}.{node.attr}"
    return None


def dump(node: object) -> str:
    """The text of a syntax tree; unlike that of `ast.dump`, fields that are empty, and so new ones, are not in it."""
    if isinstance(node, list):
        return f"[{', '.join(map(dump, node))}]"
    if isinstance(node, ast.AST):
        fields = (f"{k}={dump(v)}" for k, v in ast.iter_fields(node) if v is not None and v != [])
        return f"{type(node).__name__}({', '.join(fields)})"
    return repr(node)
