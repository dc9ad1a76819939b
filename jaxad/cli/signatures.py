"""Signatures of functions whose modules need JAX, read without importing them: so a wrong option is told at once."""

import ast
import builtins
import copy
import functools
import importlib
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jaxad


def signature(module: str, name: str, omit: Collection[str] = ()) -> Callable[..., dict[str, Any]]:
    """A function with the parameters and the docstring of one in a module of jaxad; it returns its arguments.

    Args:
        module: Dotted name of the module.
        name: Name of the function.
        omit: Keyword parameters to leave out.
    """
    nodes = _parse(module).body
    function = copy.deepcopy(next(node for node in nodes if isinstance(node, ast.FunctionDef) and node.name == name))
    arguments = function.args
    kept = [pair for pair in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if pair[0].arg not in omit]
    arguments.kwonlyargs, arguments.kw_defaults = [arg for arg, _ in kept], [default for _, default in kept]
    function.returns = None
    function.body = [*(function.body[:1] if ast.get_docstring(function) else []), *ast.parse("return locals()").body]
    return _evaluate(module, arguments, ast.Module([function], []), "exec")[name]


def _evaluate(module: str, names: ast.AST, code: Any, mode: str) -> Any:
    """Runs code that uses the names in part of a module; returns its value or its definitions."""
    used = {node.id for node in ast.walk(names) if isinstance(node, ast.Name)}
    scope = {name: _value(module, name) for name in used}
    compiled = compile(ast.fix_missing_locations(code), f"<{module}>", mode)
    if mode == "eval":
        return eval(compiled, scope)
    exec(compiled, scope)
    return scope


def _value(module: str, name: str) -> Any:
    """What a name means at the top of a module."""
    for node in _parse(module).body:
        if isinstance(node, ast.Assign) and any(isinstance(one, ast.Name) and one.id == name for one in node.targets):
            return _evaluate(module, node.value, ast.Expression(node.value), "eval")
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if name == (alias.asname or alias.name) and node.module.startswith("jaxad."):
                    return _value(node.module, alias.name)
                if name == (alias.asname or alias.name):
                    return getattr(importlib.import_module(node.module), alias.name)
    return getattr(builtins, name)


@functools.cache
def _parse(module: str) -> ast.Module:
    path = Path(jaxad.__file__).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
    return ast.parse(path.read_text(encoding="utf-8"))
