"""Writes docs/python.md from the public names of `graceful`, so that the page cannot differ from the code.

python -m graceful.flows.api_reference > docs/python.md

Signatures and fields are read from the source text: they print alike whatever the versions of Python and NumPy are.
"""

import ast
import importlib
import inspect
import sys
import textwrap
from typing import Any

_OPENING = """# Python

`import graceful` loads nothing heavy; a name loads what it needs when it is first used. What is listed here is public,
and everything else may change. What a caller can mend is raised as `graceful.GracefulError`. This page is made by
`python -m graceful.flows.api_reference`; `help(graceful.nfr_bound)` and the like say the same.

```python
import graceful

workspace = graceful.open("shop")
print(workspace.status()["champion"])
for hits in workspace.search(["query.jpg"], k=3):
    print(hits[0].item_id, hits[0].score)
```

Functions of plain arrays need no workspace, and judge any two models:

```python
import numpy as np

import graceful

before, after = np.ones(1000, bool), np.ones(1000, bool)
after[:30] = False  # thirty searches that worked fail
identity = np.arange(1000) // 10  # ten queries of each identity
print(graceful.nfr_bound(before, after, identity).upper)  # at 95 %, the share is below this
```"""

_SECTIONS = {
    "Workspace": ("flows.api", "errors"),
    "Judge two models": ("evaluation.arrays", "evaluation.policy", "evaluation.decision"),
    "Bounds and numbers of queries": ("evaluation.intervals", "evaluation.bands", "evaluation.power"),
    "Flips": ("evaluation.flips",),
    "Matrix of generations": ("evaluation.matrix",),
    "Backfill curves": ("evaluation.backfill",),
    "Retrieval": ("evaluation.retrieval", "evaluation.outcomes", "indexing.exact"),
}


def reference() -> str:
    """The whole page."""
    package = importlib.import_module("graceful")
    named = {name: getattr(package, name) for name in package.__all__ if not name.startswith("_")}
    parts = [_OPENING]
    for title, places in _SECTIONS.items():
        parts.append(f"## {title}")
        for place in places:
            home = f"graceful.{place}"
            inside = {name: thing for name, thing in named.items() if thing.__module__ == home}
            parts += [part for name in sorted(inside, key=_rank) for part in _entry(name, inside[name])]
            named = {name: thing for name, thing in named.items() if name not in inside}
    assert not named, f"no section for {', '.join(named)}: name their module in _SECTIONS"
    return "\n\n".join(parts) + "\n"


def _rank(name: str) -> tuple[bool, str]:
    """Functions first, then classes."""
    return name[0].isupper(), name


def _entry(name: str, thing: Any) -> list[str]:
    tree = _tree(thing)
    if isinstance(tree, ast.FunctionDef):
        return [f"### graceful.{name}", _block(f"graceful.{_signature(tree)}", thing)]
    assert isinstance(tree, ast.ClassDef)
    parts = [f"### graceful.{name}", _block("", thing)]
    fields = [node for node in tree.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    if fields:
        parts.append("\n".join(["| field | type | default | meaning |", "|---|---|---|---|", *map(_field, fields)]))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            shown = f"{name}.{_signature(node, bound=not _is_property(node))}"
            parts.append(_block(shown, getattr(thing, node.name)))
    return parts


def _tree(thing: Any) -> ast.stmt:
    return ast.parse(textwrap.dedent(inspect.getsource(thing))).body[0]


def _is_property(node: ast.FunctionDef) -> bool:
    return any(isinstance(mark, ast.Name) and mark.id == "property" for mark in node.decorator_list)


def _signature(node: ast.FunctionDef, bound: bool = False) -> str:
    """As it stands in the source, one argument a line where it is long; without `self`."""
    if _is_property(node):
        return f"{node.name}: {_type(node.returns)}"
    given = node.args
    positional = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(positional) - len(given.defaults)) + list(given.defaults)
    arguments = [_argument(*pair) for pair in zip(positional, defaults, strict=True)][1 if bound else 0 :]
    if given.vararg or given.kwonlyargs:
        arguments.append(f"*{given.vararg.arg}" if given.vararg else "*")
    arguments += [_argument(*pair) for pair in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    result = f" -> {_type(node.returns)}" if node.returns else ""
    line = f"{node.name}({', '.join(arguments)}){result}"
    return line if len(line) < 90 else f"{node.name}(\n    " + ",\n    ".join(arguments) + f",\n){result}"


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    text = f"{argument.arg}: {_type(argument.annotation)}" if argument.annotation else argument.arg
    return text if default is None else f"{text} = {ast.unparse(default)}"


def _type(annotation: ast.expr | None) -> str:
    """An annotation as text: of a quoted one what is quoted, of an annotated one the type."""
    if annotation is None:
        return ""
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Annotated":
        assert isinstance(annotation.slice, ast.Tuple)
        return _type(annotation.slice.elts[0])
    quoted = isinstance(annotation, ast.Constant) and isinstance(annotation.value, str)
    text = str(annotation.value) if isinstance(annotation, ast.Constant) and quoted else ast.unparse(annotation)
    return text.replace("'", "")


def _field(node: ast.AnnAssign) -> str:
    default, meaning = "", ""
    value = node.value
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "Field":
        given = {keyword.arg: keyword.value for keyword in value.keywords}
        default = ast.unparse(given["default"]) if "default" in given else ""
        meaning = str(ast.literal_eval(given["description"])) if "description" in given else ""
    elif value is not None:
        default = ast.unparse(value)
    assert isinstance(node.target, ast.Name)
    # A bar inside a code span ends the cell, or shows its backslash: which one depends on who renders the page.
    cells = (node.target.id, _type(node.annotation).replace(" | ", " or "), default)
    shown = " | ".join(f"`{cell}`" if cell else "" for cell in cells)
    assert "|" not in "".join([*cells, meaning]), f"{node.target.id}: a bar in a table"
    return f"| {shown} | {meaning} |"


def _block(signature: str, thing: Any) -> str:
    """Signature and docstring; of the methods a short one may explain itself."""
    parts = [part for part in (signature, inspect.getdoc(thing)) if part]
    return "\n".join(["```text", "\n\n".join(parts), "```"])


if __name__ == "__main__":
    sys.stdout.write(reference())
