"""What the endpoint says about itself: bodies and examples for /openapi.json, and a page of it that loads nothing."""

import html
import json
from typing import Any

from graceful.flows.search.answering import MAX_K, TextQuery, VectorQuery

SEARCH_EXAMPLE: dict[str, Any] = {
    "query_generation": "g003-9f2c1a",
    "snapshot_id": "g003-9f2c1a-5b1e0c44",
    "thresholds": {"duplicates": {"g003-9f2c1a": 0.91, "g002-1b6ea8": 0.88}},
    "hits": [
        {
            "item_id": "photos/2024/cat.jpg",
            "score": 0.934,
            "generation": "g003-9f2c1a",
            "label": "cat",
            "above": {"duplicates": True},
        }
    ],
}

_REFUSED = {
    "type": "object",
    "required": ["detail", "kind"],
    "properties": {
        "detail": {"type": "string", "description": "One line: what was expected, what was found, what to do."},
        "kind": {"type": "string", "description": "One word, as it is counted in /metrics."},
    },
}


def _refusal(description: str, kind: str, detail: str) -> dict[str, Any]:
    example = {"detail": detail, "kind": kind}
    return {"description": description, "content": {"application/json": {"schema": _REFUSED, "example": example}}}


REFUSALS: dict[int | str, dict[str, Any]] = {
    400: _refusal(
        "No body, or a form without exactly one file.",
        "wrong_request",
        "searching: expected an image or a vector in the body, found nothing",
    ),
    401: _refusal(
        "The bearer token is missing, or another one.",
        "unauthorized",
        "expected 'Authorization: Bearer <token>' with this service's token",
    ),
    404: _refusal(
        "No approved variant of this name answers.",
        "unknown_variant",
        "querying as watch: expected a variant that answers here, found edge",
    ),
    408: _refusal(
        "The body did not come in time.",
        "timeout",
        "searching: expected the whole body within 20 s, found a part; send it again",
    ),
    409: _refusal(
        "The vector was made by another generation than the one that answers, or ?generation= names one that may not; "
        "or a label comes while no canary is under way.",
        "other_generation",
        "the query was encoded by g002-1b6ea8, but g003-9f2c1a answers; encode it again",
    ),
    413: _refusal(
        "The body is larger than an image, or a vector of this width, may be.",
        "too_large",
        "searching: expected at most 32 MiB, found more; send a smaller body",
    ),
    422: _refusal(
        "The image cannot be decoded or has too many pixels; the vector has another width, NaN, or is zero; the text "
        "is empty, too long or has no vector; or a text came for an encoder of images, or an image for one of texts.",
        "unreadable_image",
        "searching: the image is too large: expected at most 25,000,000 pixels, found 13300x13300; give a readable "
        "image",
    ),
    429: _refusal(
        "Too many searches wait; Retry-After says for how many seconds.",
        "busy",
        "searching: 256 images wait already; ask again",
    ),
    503: _refusal(
        "No generation serves yet, a part of a sharded index does not answer, or a text tower fails.",
        "nothing_served",
        "searching: expected a serving generation, found none; run 'graceful update' first",
    ),
}

_IMAGE = {"type": "string", "format": "binary", "description": "An image file."}

IMAGE_BODY: dict[str, Any] = {
    "required": True,
    "description": "An image, alone or as the one file of a form.",
    "content": {
        "image/*": {"schema": _IMAGE},
        "multipart/form-data": {
            "schema": {"type": "object", "required": ["image"], "properties": {"image": _IMAGE}},
        },
    },
}

REQUEST_BODY: dict[str, Any] = {
    "required": True,
    "description": "An image, alone or as the one file of a form; a vector; or a text, for a text tower (?as=words).",
    "content": {
        **IMAGE_BODY["content"],
        "application/json": {
            "schema": {"oneOf": [VectorQuery.model_json_schema(), TextQuery.model_json_schema()]},
            "examples": {
                "vector": {"value": {"vector": [0.12, -0.07, 0.99], "generation": "g003-9f2c1a", "k": 5}},
                "text": {"value": {"text": "a red shoe", "as": "words", "k": 5}},
            },
        },
    },
}
"""What a search may send: FastAPI cannot see that one address takes four kinds."""

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem}"
    "pre{background:#f4f4f4;padding:.8rem;overflow:auto}h2 code{background:none}code{background:#f4f4f4}"
)


def page(document: dict[str, Any]) -> str:
    """An HTML page of an OpenAPI document: every path with its parameters, bodies, answers and examples."""
    info = document["info"]
    parts = [
        f"<h1>{_text(info['title'])}</h1><p>{_text(info['description'])} A query asks for {MAX_K:,} items at most."
    ]
    parts.append('<p>The same for programs: <a href="openapi.json">openapi.json</a>.</p>')
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts.append(f"<h2><code>{method.upper()} {_text(path)}</code></h2><p>{_text(operation['summary'])}.</p>")
            for parameter in operation.get("parameters", ()):
                default = json.dumps(parameter["schema"].get("default"))
                line = f"{_text(parameter.get('description', ''))} Default {_text(default)}."
                parts.append(f"<p><code>?{_text(parameter['name'])}=</code> {line}</p>")
            if "requestBody" in operation:
                parts.append(f"<h3>Body</h3><p>{_text(operation['requestBody']['description'])}</p>")
                parts += _contents(operation["requestBody"]["content"])
            for status, answer in operation["responses"].items():
                parts.append(f"<h3>{_text(status)}</h3><p>{_text(answer['description'])}</p>")
                parts += _contents(answer.get("content", {}))
    title = _text(info["title"])
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    return "\n".join([head, *parts, "</html>"])


def _contents(contents: dict[str, Any]) -> list[str]:
    parts = []
    for kind, content in contents.items():
        parts.append(f"<p><code>{_text(kind)}</code></p>")
        several = [one["value"] for one in content.get("examples", {}).values()]
        for shown in several or [content.get("example", content.get("schema"))]:
            if shown:
                parts.append(f"<pre>{_text(json.dumps(shown, indent=2))}</pre>")
    return parts


def _text(value: str) -> str:
    return html.escape(str(value))
