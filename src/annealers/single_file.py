"""Merges a class of annealers and all that it needs of annealers into the source of one module.

Modules follow each other in the order of their imports, without the imports of each other and without `__all__`.
Imports inside functions stay as they are: they say which methods need annealers to be installed.
"""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypeGuard

# Not `from annealers import`: Diffusers looks for such lines and warns of packages that are missing.
INSTALLED_CLASS = """
# Where annealers is installed, its class is used instead of this copy, so that there is only one.
try:
    import annealers as installed

    {class_name} = installed.{class_name}
except (ImportError, AttributeError):
    pass
"""


def single_file(class_name: str) -> str:
    """The source of a public class of annealers, on its own; where annealers is installed it yields the class of that.

    Raises:
        ValueError: If a module imports another in a way that has no single-file form, or two modules give one name to
            different things.
    """
    modules = list(_with_dependencies(_defining_module("annealers", class_name), seen=set()))
    _check_names(modules)
    version = importlib.import_module("annealers").__version__
    parts = [
        f"# {class_name} and what it needs of annealers {version} (Apache-2.0), in one file.",
        *sorted({line for module in modules for line in module.future_imports}),
        *(f"# ---- {module.name} ".ljust(119, "-") + f"\n\n{module.body}" for module in modules),
        INSTALLED_CLASS.format(class_name=class_name),
    ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


class Module(NamedTuple):
    """One module of annealers, taken apart."""

    name: str
    dependencies: list[str]
    future_imports: list[str]
    body: str  # the source without its imports of annealers
    definitions: dict[str, str]  # every name that the module binds, and to what


def _with_dependencies(name: str, seen: set[str]) -> Iterator[Module]:
    """The module after all those it imports, each once."""
    if name in seen:
        return
    seen.add(name)
    module = _take_apart(name)
    for dependency in module.dependencies:
        yield from _with_dependencies(dependency, seen)
    yield module


def _take_apart(name: str) -> Module:
    source, tree = _source(name)
    lines = source.splitlines()
    imports = [node for node in tree.body if _imports_annealers(node)]
    _check_imports(name, tree, imports)

    future_imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
    export_lists = [node for node in tree.body if isinstance(node, ast.Assign) and _targets(node) == ["__all__"]]
    for node in [*imports, *future_imports, *export_lists]:
        lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    renamed = [f"{alias.asname} = {alias.name}" for node in imports for alias in node.names if alias.asname]
    kept = [node for node in tree.body if node not in (*imports, *future_imports, *export_lists)]
    return Module(
        name=name,
        dependencies=[_defining_module(node.module, alias.name) for node in imports for alias in node.names],
        future_imports=[ast.unparse(node) for node in future_imports],
        body=re.sub(r"\n{4,}", "\n\n\n", "\n".join([*renamed, *lines])),
        definitions=dict(line.split(" = ") for line in renamed) | dict(_definitions(kept)),
    )


def _source(name: str) -> tuple[str, ast.Module]:
    source = Path(importlib.import_module(name).__file__).read_text(encoding="utf-8")
    return source, ast.parse(source)


def _defining_module(name: str, attribute: str) -> str:
    """The module where `attribute` of module `name` is written down, through the `__init__` files that pass it on.

    An `__init__` that imports its names on first use still lists them, for type checkers.
    """
    for node in ast.walk(_source(name)[1]):
        if _imports_annealers(node):
            for alias in node.names:
                if (alias.asname or alias.name) == attribute:
                    return _defining_module(node.module, alias.name)
    module = importlib.import_module(name)
    if hasattr(module, "__path__") or not hasattr(module, attribute):
        raise ValueError(f"cannot export: {attribute!r} is not defined in a module that {name} imports it from")
    return name


def _imports_annealers(node: ast.AST) -> TypeGuard[ast.ImportFrom]:
    return isinstance(node, ast.ImportFrom) and (node.level > 0 or (node.module or "").split(".")[0] == "annealers")


def _check_imports(name: str, tree: ast.Module, imports: list[ast.ImportFrom]) -> None:
    """Refuses every import of annealers but `from annealers.module import name`, at the top or inside a function."""
    inside_functions = {
        inner for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        whole = isinstance(node, ast.Import) and any(alias.name.split(".")[0] == "annealers" for alias in node.names)
        if node in inside_functions or not (whole or _imports_annealers(node)):
            continue
        if node not in imports or node.level > 0:
            raise ValueError(
                f"cannot export {name}, line {node.lineno}: `{ast.unparse(node)}` must be a plain line "
                f"`from annealers.module import name`, or stand inside a function"
            )


def _targets(node: ast.Assign | ast.AnnAssign) -> list[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]


def _definitions(statements: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    """The names that statements bind at the top of a module, each with a text that tells two meanings apart."""
    for node in statements:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                where = f"from {node.module} " if isinstance(node, ast.ImportFrom) else ""
                yield (alias.asname or alias.name).split(".")[0], f"{where}import {alias.name} as {alias.asname}"
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name, ast.dump(node)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            for name in _targets(node):
                yield name, ast.dump(node)
        elif isinstance(node, (ast.If, ast.Try, ast.With)):
            yield from _definitions([child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)])


def _check_names(modules: list[Module]) -> None:
    """Refuses one name for two things, of which the merged module would keep the last."""
    defined: dict[str, tuple[str, str]] = {}
    for module in modules:
        for name, definition in module.definitions.items():
            other, first = defined.setdefault(name, (module.name, definition))
            if definition != first:
                raise ValueError(f"cannot export: {other} and {module.name} both define {name!r}, differently")
