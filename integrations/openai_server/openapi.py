"""The OpenAPI document, with the answers as they are."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from hf_paged.integrations.openai_server.guard import GENERATING, OPEN_PATHS

ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "integer", "null"]},
            },
        }
    },
}
ERRORS = {
    "400": "Something is wrong with the request; the message says what.",
    "401": "No valid API key.",
    "404": "No such model.",
    "408": "The body took too long to arrive.",
    "413": "The body is too large.",
    "429": "Too many requests are under way; Retry-After says when to try again.",
    "500": "The server's own mistake.",
    "503": "The server must be started again; the message says why.",
}
EVENTS = {"schema": {"type": "string"}}
"""Of a stream: server-sent events, each a JSON object, then [DONE]."""


def describe(app: FastAPI, *, needs_key: bool) -> None:
    """Has the application's document say which errors come in which shape, what streams, and what needs a key."""
    generate = app.openapi

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _complete(generate(), needs_key)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _complete(document: dict[str, Any], needs_key: bool) -> dict[str, Any]:
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas["Error"] = ERROR_SCHEMA
    if needs_key:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            locked = needs_key and path not in OPEN_PATHS
            if locked:
                operation["security"] = [{"key": []}]
            told = operation["responses"]
            told.pop("422", None)
            for status in _errors(path, method, "requestBody" in operation, locked):
                content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
                told[status] = {"description": ERRORS[status], "content": content}
            if path in GENERATING:
                told["200"]["content"]["text/event-stream"] = EVENTS
    return document


def _errors(path: str, method: str, has_body: bool, locked: bool) -> list[str]:
    found = ["408", "413", "500"]  # any request may have a body
    if has_body:
        found.append("400")
    if has_body or "{" in path:
        found.append("404")
    if locked:
        found.append("401")
    if path in GENERATING:
        found += ["429", "503"]
    if path in ("/health", "/ping"):
        found.append("503")
    return sorted(found)
