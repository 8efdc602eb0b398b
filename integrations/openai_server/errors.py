"""Errors in OpenAI's shape."""

from __future__ import annotations

import difflib
import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from hf_paged.integrations.openai_server import protocol

logger = logging.getLogger(__name__)

TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
}


class ApiError(Exception):
    """What a client gets instead of an answer."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = TYPES.get(status, "APIError")
    return {"error": {"message": message[:2000], "type": kind, "param": param, "code": code or status}}


def error_response(status: int, message: str, param: str | None = None, code: str | None = None) -> JSONResponse:
    headers = {"Retry-After": "1"} if status in (429, 503) else None
    if status in (408, 413):  # the rest of the body is not waited for
        headers = {"Connection": "close"}
    return JSONResponse(error_body(status, message, param, code), status, headers=headers)


def as_api_error(error: Exception) -> ApiError:
    """What goes wrong with a request's values is the client's doing, all else is ours."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValueError | TypeError | OverflowError | RecursionError):
        return ApiError(400, str(error) or type(error).__name__)
    logger.error("a request failed", exc_info=error)
    return ApiError(500, f"{type(error).__name__}: {error}")


def add_handlers(app: FastAPI) -> None:
    """Has whatever goes wrong in an endpoint told in OpenAI's shape."""

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        told = as_api_error(error)
        return error_response(told.status, told.message, told.param, told.code)

    for kind in (ApiError, ValueError, TypeError, RuntimeError):
        app.exception_handler(kind)(failed)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        message = str(error.detail)
        if error.status_code == 404:
            message = f"there is no {request.method} {request.url.path}"
        return error_response(error.status_code, message)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        found = error.errors()
        # Of a field that may have several types there is an error for each: the one that got furthest says most.
        first = max((one for one in found if one["loc"][:2] == found[0]["loc"][:2]), key=lambda one: len(one["loc"]))
        where = ".".join(str(part) for part in first["loc"] if part != "body" and not _is_type(part))
        if first["type"] == "json_invalid":
            return error_response(400, f"the body is no JSON: {first.get('ctx', {}).get('error', first['msg'])}")
        if first["loc"] == ("body",):
            return error_response(400, "the body must be a JSON object, sent with Content-Type: application/json")
        message = first["msg"]
        if isinstance(given := first.get("input"), str | int | float):
            message += f", got {given!r:.80}"
        if first["type"] == "extra_forbidden":
            name = str(first["loc"][-1])
            near = difflib.get_close_matches(name, _field_names(), n=1)
            message = "there is no such field" + (f"; did you mean {near[0]!r}?" if near else "")
        return error_response(400, f"{where}: {message}" if where else message, where or None)


def _is_type(part: str | int) -> bool:
    """Whether a part of a place is no field but which of several types pydantic tried there."""
    return isinstance(part, str) and ("[" in part or part in ("str", "constrained-str", "NamedToolChoice"))


def _field_names() -> list[str]:
    models = (protocol.CompletionRequest, protocol.ChatCompletionRequest, protocol.ResponsesRequest)
    return sorted({name for model in models for name in model.model_fields})
