"""Whether a named network can be built, found out without importing it, torch or torchvision."""

import ast
import difflib
import importlib.util
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_REGISTERED = re.compile(
    r"""^@register_model(?:\((?:name=["'](\w+)["'])?\))?(?:\n@[^\n]*(?:\n[ )][^\n]*)*)*\ndef (\w+)\(""", re.MULTILINE
)


def problem_with_factory(name: str) -> tuple[str, str] | None:
    """What is wrong with 'package.module:factory', and a remedy; None when it is there. The folder here is looked in.

    Packages around the module are imported, the module itself is only read.
    """
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        return f"expected package.module:factory, found {name!r}", "name a module and a function in it"
    with _looking_here():
        try:
            spec = importlib.util.find_spec(module)
        except Exception as error:  # whatever a package of somebody else raises when it is imported
            return (
                f"expected an importable {module}, found {' '.join(str(error).split())}",
                "check the name and PYTHONPATH",
            )
    if spec is None:
        return f"expected an importable {module}, found none", f"put it into {os.getcwd()} or on PYTHONPATH"
    if not spec.origin or not spec.origin.endswith(".py"):
        return None
    try:
        names = _names_in(Path(spec.origin).read_text())
    except SyntaxError as error:
        return f"expected Python in {spec.origin}, found {error.msg} in line {error.lineno}", "correct it"
    if names is None or attribute in names:
        return None
    return f"expected {attribute} in {spec.origin}, found none", _nearest(attribute, names)


def problem_with_network(name: str) -> tuple[str, str] | None:
    """What is wrong with a backbone's name, and a remedy; None when it is known, or cannot be known."""
    if ":" in name:
        return problem_with_factory(name)
    if name.startswith("timm/"):
        return _problem_with_timm(name)
    known = torchvision_models()
    if name == "small_cnn" or not known or name in known:
        return None
    return (
        f"expected small_cnn, timm/NAME, package.module:factory or a torchvision model, found {name!r}",
        _nearest(name, {"small_cnn", *known}),
    )


def problem_with_encoder(name: str) -> tuple[str, str] | None:
    """What is wrong with the name of an encoder to adopt, and a remedy: timm/NAME, torchvision/NAME or a factory."""
    if name.startswith("timm/"):
        return _problem_with_timm(name)
    if not name.startswith("torchvision/"):
        return problem_with_factory(name)
    bare, known = name.removeprefix("torchvision/").partition(".")[0], torchvision_models()
    return (f"expected a torchvision model, found {bare!r}", _nearest(bare, known)) if bare not in known else None


def torchvision_models() -> set[str]:
    """Names of torchvision's models, read in its source: importing it takes seconds. Empty where it is not there."""
    return _registered("torchvision")


def _problem_with_timm(name: str) -> tuple[str, str] | None:
    bare, known = name.removeprefix("timm/").partition(".")[0], _registered("timm")
    if not known:
        return f"expected timm to be installed for {name}, found that it is not", "pip install 'graceful[timm]'"
    return None if bare in known else (f"expected a model of timm, found {bare!r}", _nearest(bare, known))


def _registered(library: str) -> set[str]:
    spec = importlib.util.find_spec(library)
    if spec is None or not spec.origin:
        return set()
    files = Path(spec.origin).parent.joinpath("models").rglob("*.py")
    return {named or function for file in files for named, function in _REGISTERED.findall(file.read_text())}


@contextmanager
def _looking_here() -> Iterator[None]:
    before = list(sys.path)
    sys.path.append(os.getcwd())
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = before


def _names_in(source: str) -> set[str] | None:
    """Names at the top level of a module; None where they cannot be known without running it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            return None
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update(alias.asname or alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return None if "__getattr__" in names else names


def _nearest(name: str, names: set[str]) -> str:
    near = difflib.get_close_matches(name, sorted(names), n=1)
    return f"did you mean {near[0]!r}?" if near else "check the name"
