"""Exceptions -> the contract's error table."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray.exceptions import RayActorError, RayTaskError, TaskCancelledError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from starlette.exceptions import HTTPException

from deployments.access.keys import UnauthorizedError
from deployments.access.limits import RateLimitedError
from deployments.api.schemas import ErrorDetail, ErrorResponse
from deployments.telemetry.metrics import metrics
from pipelines.errors import (
    BackendError,
    DeadlineError,
    OverloadedError,
    RequestError,
    TooLargeError,
    UnavailableModelError,
    UnstartableError,
)

logger = logging.getLogger("sdgraph.http")

RETRY_AFTER_OVERLOAD_S = 5


@dataclass(frozen=True)
class Failure:
    """One row of the error table, filled in."""

    status: int
    code: int
    type: str
    message: str
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    detail: list[dict[str, Any]] | None = None


def cause_of(error: BaseException) -> BaseException:
    """What really happened.

    Ray wraps a replica's exception, once an edge; a task group groups them; and Serve has a wrapper for a call that
    could not begin because one it depends on died.
    """
    while True:
        if isinstance(error, RayTaskError) and isinstance(error.cause, BaseException) and error.cause is not error:
            error = error.cause
        elif isinstance(error, RayServeException) and isinstance(error.__cause__, RayActorError):
            error = error.__cause__
        elif isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        else:
            return error


def failure_of(error: BaseException, request_id: str) -> Failure:
    """The answer to an exception. One we do not know is a 500 that tells the request id and nothing of the inside."""
    return counted(_failure_of(cause_of(error), request_id))


def counted(failure: Failure) -> Failure:
    """The failure, which the metrics now know of."""
    metrics().errors.inc(1, {"status": str(failure.status), "code": str(failure.code)})
    return failure


def _failure_of(error: BaseException, request_id: str) -> Failure:
    match error:
        case UnavailableModelError():
            return Failure(400, 40301, "invalid_request_error", error.message, error.param)
        case TooLargeError():
            return Failure(413, 40004, "invalid_request_error", error.message, error.param)
        case RequestError():
            return Failure(400, 40302, "invalid_request_error", error.message, error.param)
        case UnauthorizedError():
            headers = {"WWW-Authenticate": "Bearer"}
            return Failure(401, 40101, "authentication_error", str(error), headers=headers)
        case RateLimitedError():
            headers = {"Retry-After": str(error.retry_after)}
            return Failure(429, 42901, "rate_limit_error", error.message, headers=headers)
        case OverloadedError():
            return overloaded("more is waiting than can be done in time; try again", error.retry_after)
        case BackPressureError():
            return overloaded("all queues are full; try again")
        case RayActorError():
            logger.error("request %s failed twice on replicas that died", request_id, exc_info=error)
            return restarting(request_id)
        case UnstartableError():
            return overloaded(f"'{error}', which this request needs, cannot start now; /readyz says why", 60)
        case DeploymentUnavailableError():
            return overloaded("a part of the graph that this request needs cannot start now; /readyz says why", 60)
        case TaskCancelledError():  # the client left: nobody reads this
            return Failure(499, 40000, "cancelled", "the client left")
        case DeadlineError():
            return late(str(error), request_id)
        case BackendError():
            logger.error("request %s failed", request_id, exc_info=error)
            return Failure(500, 50001, "server_error", f"{error} (request {request_id})", "backend")
        case HTTPException(status_code=400):  # FastAPI's only one: bytes that do not decode
            detail = [{"loc": ["body"], "msg": "not JSON in UTF-8", "type": "json_invalid"}]
            return Failure(422, 40001, "invalid_request_error", "the body is not JSON in UTF-8", detail=detail)
        case HTTPException():
            return Failure(
                error.status_code, 40000, "invalid_request_error", str(error.detail), headers=error.headers or {}
            )
    logger.error("request %s failed", request_id, exc_info=error)
    return Failure(500, 50001, "server_error", f"internal error; the server's log knows it as request {request_id}")


def overloaded(message: str, retry_after: int = RETRY_AFTER_OVERLOAD_S) -> Failure:
    """Come back later."""
    return Failure(503, 42903, "overloaded_error", message, headers={"Retry-After": str(retry_after)})


def restarting(request_id: str) -> Failure:
    """A replica died under the request, twice."""
    return overloaded(f"a part of the graph is restarting; try again (request {request_id})")


def late(message: str, request_id: str) -> Failure:
    """The deadline passed."""
    return Failure(504, 50006, "timeout_error", f"deadline passed: {message} (request {request_id})")


def validation_failure(error: RequestValidationError) -> Failure:
    """A body that does not fit the schema: a wrong value is 400, a wrong type or broken JSON 422 with `detail`."""
    # The offending input and pydantic's context stay out: a 20 MB picture, or something that is no JSON.
    errors = [{"loc": list(e["loc"]), "msg": e["msg"], "type": e["type"]} for e in error.errors()]
    first = errors[0]
    location = [str(part) for part in first["loc"] if part not in ("body", "hyperbolic", "openai")]
    param = location[0] if location and first["type"] != "json_invalid" else None
    message = f"{'.'.join(location)}: {first['msg']}" if param else str(first["msg"])
    if first["type"] in _VALUE_ERRORS:
        return counted(Failure(400, 40302, "invalid_request_error", message, param))
    return counted(Failure(422, 40001, "invalid_request_error", message, param, detail=errors))


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


def reply(failure: Failure) -> JSONResponse:
    """The error body of the contract."""
    said = ErrorDetail(message=failure.message, type=failure.type, param=failure.param, code=failure.code)
    body = ErrorResponse(**said.model_dump(), error=said, detail=failure.detail)
    content = body.model_dump(exclude={"detail"} if failure.detail is None else None)
    return JSONResponse(content, failure.status, headers=failure.headers)
