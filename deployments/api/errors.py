"""Exceptions -> the contract's error table."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray.exceptions import RayActorError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.exceptions import HTTPException

from config.choices import UnknownChoiceError
from deployments.access.keys import UnauthorizedError
from deployments.access.limits import RateLimitedError
from deployments.api.schemas import ErrorDetail, ErrorResponse
from deployments.ray_compat import cause_of
from deployments.telemetry.metrics import metrics
from pipelines.errors import (
    BackendError,
    DeadlineError,
    OverloadedError,
    RequestError,
    SilentLibraryError,
    TooLargeError,
    UnavailableModelError,
    UnstartableError,
    WeightsError,
)

logger = logging.getLogger(__name__)

RETRY_AFTER_OVERLOAD_S = 5
RETRY_AFTER_FAILED_START_S = 60


class ErrorCode(IntEnum):
    """The contract's `code`, which clients branch on."""

    OTHER = 40000
    MALFORMED = 40001
    TOO_LARGE = 40004
    UNAUTHORIZED = 40101
    UNKNOWN_MODEL = 40301
    INVALID_VALUE = 40302
    RATE_LIMITED = 42901
    OVERLOADED = 42903
    INTERNAL = 50001
    DEADLINE = 50006


@dataclass(frozen=True)
class Failure:
    """One row of the error table, filled in."""

    status: int
    code: ErrorCode
    type: str
    message: str
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    detail: list[dict[str, Any]] | None = None

    @classmethod
    def overloaded(cls, message: str, retry_after: int = RETRY_AFTER_OVERLOAD_S) -> Failure:
        """503: the client may try again after `retry_after` seconds."""
        headers = {"Retry-After": str(retry_after)}
        return cls(503, ErrorCode.OVERLOADED, "overloaded_error", message, headers=headers)

    @classmethod
    def restarting(cls, request_id: str) -> Failure:
        """503: a replica died under the request, twice."""
        return cls.overloaded(f"a part of the graph is restarting; try again (request {request_id})")

    @classmethod
    def late(cls, message: str, request_id: str) -> Failure:
        """504: the deadline passed."""
        text = f"deadline passed: {message} (request {request_id})"
        return cls(504, ErrorCode.DEADLINE, "timeout_error", text)

    @classmethod
    def invalid(cls, status: int, code: ErrorCode, message: str, param: str | None = None, **more: Any) -> Failure:
        """4xx: the request cannot be served as it stands."""
        return cls(status, code, "invalid_request_error", message, param, **more)

    def response(self) -> JSONResponse:
        """The error body of the contract; the metrics count it."""
        said = ErrorDetail(message=self.message, type=self.type, param=self.param, code=self.code)
        body = ErrorResponse(**said.model_dump(), error=said, detail=self.detail)
        return self.with_body(body.model_dump(exclude={"detail"} if self.detail is None else None))

    def with_body(self, content: dict[str, Any]) -> JSONResponse:
        """The same with a body that another dialect's clients read."""
        metrics().errors.inc(1, {"status": str(self.status), "code": str(int(self.code))})
        return _ErrorBody(content, self.status, headers=self.headers)


class _ErrorBody(JSONResponse):
    """JSON that can always be sent: text of the client's that is not Unicode (lone surrogates) is replaced."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")


def answer(error: BaseException, request_id: str) -> JSONResponse:
    """The contract's reply to an exception; errors of the server are logged."""
    return told(error, request_id).response()


def told(error: BaseException, request_id: str) -> Failure:
    """The error that a client receives for an exception; errors of the server are logged."""
    cause = cause_of(error)
    failure = failure_of(cause, request_id)
    if failure.code == ErrorCode.INTERNAL or isinstance(cause, RayActorError | WeightsError):
        logger.error("request %s failed", request_id, exc_info=cause, extra={"request_id": request_id})
    return failure


def failure_of(error: BaseException, request_id: str) -> Failure:
    """The row of the table for an exception. An unknown one is a 500 that names the request and nothing inside."""
    match error:
        case RequestValidationError():
            return _validation_failure(error)
        case UnavailableModelError():
            return Failure.invalid(400, ErrorCode.UNKNOWN_MODEL, error.message, error.param)
        case TooLargeError():
            return Failure.invalid(413, ErrorCode.TOO_LARGE, error.message, error.param)
        case RequestError():
            return Failure.invalid(400, ErrorCode.INVALID_VALUE, error.message, error.param)
        case UnauthorizedError():
            headers = {"WWW-Authenticate": "Bearer"}
            return Failure(401, ErrorCode.UNAUTHORIZED, "authentication_error", str(error), headers=headers)
        case RateLimitedError():
            headers = {"Retry-After": str(error.retry_after)}
            return Failure(429, ErrorCode.RATE_LIMITED, "rate_limit_error", error.message, headers=headers)
        case OverloadedError():
            message = "the queue is too long to finish before the deadline; try again"
            return Failure.overloaded(message, error.retry_after)
        case BackPressureError():
            return Failure.overloaded("all queues are full; try again")
        case RayActorError():
            return Failure.restarting(request_id)
        case UnstartableError():
            message = f"'{error}', which this request needs, cannot start now; /readyz says why"
            return Failure.overloaded(message, RETRY_AFTER_FAILED_START_S)
        case WeightsError():  # of a LoRA: any other weights are read when a replica starts
            what, _, _ = str(error).partition(":")
            message = f"{what} cannot be read on this server; its log knows why as request {request_id}"
            return Failure.overloaded(message, RETRY_AFTER_FAILED_START_S)
        case SilentLibraryError():
            return Failure.overloaded(str(error), RETRY_AFTER_FAILED_START_S)
        case DeploymentUnavailableError():
            message = "a part of the graph that this request needs cannot start now; /readyz says why"
            return Failure.overloaded(message, RETRY_AFTER_FAILED_START_S)
        case TaskCancelledError():  # the client left: nobody reads this
            return Failure(499, ErrorCode.OTHER, "cancelled", "the client left")
        case DeadlineError():
            return Failure.late(str(error), request_id)
        case BackendError():
            return Failure(500, ErrorCode.INTERNAL, "server_error", f"{error} (request {request_id})", "backend")
        case HTTPException(status_code=400):  # FastAPI's only one: bytes that do not decode
            detail = [{"loc": ["body"], "msg": "not JSON in UTF-8", "type": "json_invalid"}]
            return Failure.invalid(422, ErrorCode.MALFORMED, "the body is not JSON in UTF-8", detail=detail)
        case HTTPException():
            return Failure.invalid(error.status_code, ErrorCode.OTHER, str(error.detail), headers=error.headers or {})
    message = f"internal error; the server's log knows it as request {request_id}"
    return Failure(500, ErrorCode.INTERNAL, "server_error", message)


def _validation_failure(error: RequestValidationError) -> Failure:
    """A body that does not fit the schema: a wrong value is 400, a wrong type or broken JSON 422 with `detail`."""
    # The offending input and pydantic's context stay out: a 20 MB picture, or something that is no JSON.
    errors = [{"loc": list(e["loc"]), "msg": e["msg"], "type": e["type"]} for e in error.errors()]
    first = errors[0]
    location = [str(part) for part in first["loc"] if part not in ("body", "hyperbolic", "openai")]
    param = location[0] if location and first["type"] != "json_invalid" else None
    message = f"{'.'.join(location)}: {first['msg']}" if param else _json_problem(error)
    if param and first["type"] == "literal_error":
        allowed = re.findall(r"'([^']*)'", first["msg"])
        message = str(UnknownChoiceError(param, str(error.errors()[0]["input"]), allowed))
    if first["type"] in _VALUE_ERRORS:
        return Failure.invalid(400, ErrorCode.INVALID_VALUE, message, param)
    return Failure.invalid(422, ErrorCode.MALFORMED, message, param, detail=errors)


def _json_problem(error: RequestValidationError) -> str:
    """What is wrong with a body as a whole, and where, if it is not JSON."""
    first = error.errors()[0]
    if first["type"] != "json_invalid":
        return str(first["msg"])
    return f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])} at character {first['loc'][-1]}"


_VALUE_ERRORS = {
    "greater_than",
    "greater_than_equal",
    "less_than",
    "less_than_equal",
    "finite_number",
    "string_too_short",
    "string_too_long",
    "string_pattern_mismatch",
    "literal_error",
    "int_parsing_size",
}
