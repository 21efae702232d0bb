"""Writes docs/configuration.md from the config models, so that the reference cannot differ from what is accepted.

python -m graceful.flows.settings.reference > docs/configuration.md
"""

import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from graceful.flows.settings.config import PipelineConfig


def reference() -> str:
    """The whole page."""
    parts = [
        "# Configuration",
        "Every key of a workspace's `graceful.toml`. An unknown key is an error that names the nearest known one. "
        "`$NAME` is taken from the environment, `{root}` is the workspace, relative paths count from the file. This "
        "page is made by `python -m graceful.flows.settings.reference`.",
    ]
    described: dict[type[BaseModel], str] = {}
    for place, model in _tables(PipelineConfig, ""):
        title = f"`[{place}]`" if place else "Top level"
        if model in described:
            parts += [f"## {title}", f"Keys as in {described[model]}."]
            continue
        described[model] = title
        parts += [f"## {title}", (model.__doc__ or "").strip().split("\n\n")[0], _table(model)]
    return "\n\n".join(parts) + "\n"


def _tables(model: type[BaseModel], place: str) -> Iterator[tuple[str, type[BaseModel]]]:
    yield place, model
    for name, field in model.model_fields.items():
        named = ".NAME" if get_origin(field.annotation) is dict else ""
        for inner in _models(field.annotation):
            yield from _tables(inner, f"{place}.{name}{named}" if place else f"{name}{named}")


def _table(model: type[BaseModel]) -> str:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        default = "required" if field.is_required() else _default(field)
        meaning = " ".join((field.description or "").split()).replace("|", "\\|")
        lines.append(f"| `{name}` | {_type(field.annotation)} | {default} | {meaning} |")
    return "\n".join(lines)


def _default(field: Any) -> str:
    value = field.default_factory() if field.default_factory else field.default
    if isinstance(value, BaseModel) or (isinstance(value, tuple) and value and isinstance(value[0], BaseModel)):
        return "see below"
    return "" if value is PydanticUndefined else f"`{value}`"


def _type(annotation: Any) -> str:
    if _models(annotation):
        origin = get_origin(annotation)
        return "tables by name" if origin is dict else "table" if origin is not tuple else "list of tables"
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        return " or ".join(_type(part) for part in get_args(annotation) if part is not type(None))
    if get_origin(annotation) is tuple:
        return "list"
    return str(getattr(annotation, "__name__", annotation)).replace("|", "or")


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    parts = get_args(annotation)
    if get_origin(annotation) is dict and not isinstance(parts[1], type):  # values of several forms
        return []
    return [model for part in parts for model in _models(part)]


if __name__ == "__main__":
    print(reference(), end="")
