"""What the constructor of a part declares that it takes, read from its source: no module is imported, so none is run."""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Literal

from common.ranges import ANY, Range


class Part:
    """Stands for any class in an annotation: in a configuration a node with its own settings."""


PLAIN: dict[str, Any] = {
    "int": int, "float": float, "bool": bool, "str": str, "None": None, "object": object, "Any": object, "Path": str,
    "list": list[object], "Sequence": list[object], "tuple": list[object], "dict": dict[str, object],
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A name that a module defines: the node of its class or of the alias it is."""

    module: str
    node: ast.AST


@cache
def source_of(module: str) -> tuple[ast.Module, bool] | None:
    """Return the syntax of a module and whether it is a package; None where there is no such source."""
    bare = Path(*module.split("."))
    for place in sys.path:
        for path in (Path(place) / bare / "__init__.py", Path(place) / bare.with_suffix(".py")):
            if path.is_file():
                return ast.parse(path.read_text(encoding="utf-8")), path.name == "__init__.py"
    return None


@cache
def definition(module: str, name: str, depth: int = 8) -> Place | None:
    """Return where a name of a module is defined, imports followed; None where that is not known."""
    source = source_of(module) if depth else None
    if source is None:
        return None
    tree, is_package = source
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return Place(module, node)
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            return Place(module, node.value)
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return definition(absolute(module, is_package, node), alias.name, depth - 1)
    return None


def absolute(module: str, is_package: bool, node: ast.ImportFrom) -> str:
    """Return the module that `from ... import` names."""
    parents = module.split(".")[: len(module.split(".")) - node.level + is_package] if node.level else []
    return ".".join([*parents, *([node.module] if node.module else [])])


def kind_of(node: ast.expr | None, module: str) -> Any:
    """Return the type an annotation stands for; Part for any class, object where it cannot be known."""
    if node is None:
        return object
    if isinstance(node, ast.Constant):
        return kind_of(ast.parse(node.value, mode="eval").body, module) if isinstance(node.value, str) else node.value
    if isinstance(node, ast.BinOp):
        return kind_of(node.left, module) | kind_of(node.right, module)
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        return subscripted(node.value.id, node.slice, module)
    if not isinstance(node, ast.Name):
        return Part
    if node.id in PLAIN:
        return PLAIN[node.id]
    place = definition(module, node.id)
    is_alias = place is not None and isinstance(place.node, ast.Subscript | ast.BinOp)
    return kind_of(place.node, place.module) if place is not None and is_alias else Part  # type: ignore[arg-type]


def subscripted(name: str, inner: ast.expr, module: str) -> Any:
    """Return the type of name[inner]."""
    if name == "Literal":
        return Literal[ast.literal_eval(inner)]
    if name == "Annotated" and isinstance(inner, ast.Tuple):
        return Annotated[kind_of(inner.elts[0], module), range_of(inner.elts[1])]
    parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
    kinds = [object if isinstance(part, ast.Constant) and part.value is ... else kind_of(part, module) for part in parts]
    if name in ("Union", "Optional"):
        return reduce(or_, [*kinds, None] if name == "Optional" else kinds)
    if name in ("list", "Sequence", "Iterable") or (name == "tuple" and len(parts) == 2 and kinds[1] is object):
        return list[kinds[0]]  # type: ignore[valid-type]
    if name in ("dict", "Mapping"):
        return dict[str, kinds[-1]]  # type: ignore[valid-type]
    return tuple[*kinds] if name == "tuple" else Part  # type: ignore[valid-type]


def range_of(node: ast.expr) -> Range:
    """Return the range written as Range(...) with literal numbers; ANY for another expression, which is not carried out."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Range"):
        return ANY
    ends = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}
    return Range(*map(ast.literal_eval, node.args), **ends)


@cache
def parameters(target: str) -> dict[str, Any]:
    """Return name -> type of what a class's constructor takes, by ** that of its bases too; {} if unknown."""
    module, _, name = target.rpartition(".")
    place = definition(module, name) if module else None
    if place is None or not isinstance(place.node, ast.ClassDef):
        return {}
    constructor = next((f for f in place.node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"), None)
    if constructor is None:
        return inherited(place)
    arguments = constructor.args
    own = {a.arg: kind_of(a.annotation, place.module) for a in [*arguments.args[1:], *arguments.kwonlyargs]}
    if arguments.kwarg is None:
        return own
    return (fields(arguments.kwarg.annotation, place.module) or inherited(place)) | own


def inherited(place: Place) -> dict[str, Any]:
    """Return the parameters of the bases of a class."""
    found: dict[str, Any] = {}
    for base in bases_of(place):
        found |= parameters(f"{base.module}.{base.node.name}")  # type: ignore[attr-defined]
    return found


def bases_of(place: Place) -> Iterator[Place]:
    """Yield where each base of a class is defined, of those whose source is there."""
    for base in place.node.bases if isinstance(place.node, ast.ClassDef) else ():
        at = definition(place.module, base.id) if isinstance(base, ast.Name) else None
        if at is not None and isinstance(at.node, ast.ClassDef):
            yield at


def derives(target: str, base: str) -> bool:
    """Whether the source of a class, by its dotted name, says that it is `base` or derived from it."""
    wanted, places = definition(*base.rsplit(".", 1)), [definition(*target.rsplit(".", 1))] if "." in target else []
    for place in places:
        places += bases_of(place) if place is not None else ()
    return wanted is not None and wanted in places


def fields(annotation: ast.expr | None, module: str) -> dict[str, Any]:
    """Return what a TypedDict in Unpack[...] has, by name; {} for another annotation."""
    if not isinstance(annotation, ast.Subscript) or not isinstance(annotation.slice, ast.Name):
        return {}
    place = definition(module, annotation.slice.id)
    if place is None or not isinstance(place.node, ast.ClassDef):
        return {}
    own = [node for node in place.node.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    return {ast.unparse(node.target): kind_of(node.annotation, place.module) for node in own}
