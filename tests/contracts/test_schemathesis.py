"""Requests made from /openapi.json, good and bad, 500 and more of them: what it promises holds, no 5xx, no hang."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation.modes import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from config.catalog import Catalog
from deployments.graph import Graph
from tests.support.ingress import make_app

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

HANG_S = 60
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
"""Others take every 400 for a mistake of the document; but which values fit which model no schema can say."""
MODELS = ["SD1.5", "SD2", "SDXL1.0-base", "SDXL-turbo", "SD1.5-ControlNet"]
seen: dict[str, int] = {}


@pytest.fixture(scope="module")
def server(graph: Graph, catalog: Catalog) -> Iterator[str]:
    """The HTTP application behind a real server on loopback; its budget lets small pictures through."""
    app = make_app(graph=graph, catalog=catalog, deadline_s=HANG_S / 2, max_pixel_steps=256 * 256 * 4)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def schema(server: str) -> Any:
    made = schemathesis.openapi.from_url(f"{server}/openapi.json")

    @made.hook("map_body")
    def name_a_model(context: Any, body: Any) -> Any:
        """Random names are never a model's: two bodies in three get one, and a size that is small enough."""
        if isinstance(body, dict) and isinstance(body.get("model_name"), str) and len(str(body)) % 3:
            body["model_name"] = MODELS[len(str(body)) % len(MODELS)]
            body |= {"width": 256, "height": 256, "steps": 1 + len(str(body)) % 4}
        elif isinstance(body, dict) and isinstance(body.get("prompt"), str) and len(str(body)) % 3:
            body |= {"model": MODELS[0], "size": "256x256", "width": None, "height": None, "n": 1}
            body["steps"] = 1 + len(str(body)) % 4
            if context.operation.path.startswith("/sdapi/"):
                body |= {"width": 256, "height": 256, "batch_size": 1, "n_iter": 1, "enable_hr": False}
        return body

    return made


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_what_the_document_promises_holds(schema: Any, mode: GenerationMode) -> None:
    operations = [schema[path][method] for path in schema for method in schema[path]]
    drawing = ("/v1/image/generation", "/v1/images/generations", "/v1/images/edits", "/models/{name}")
    pictures = ("/v1/images/info", "/v1/images/upscale", "/controlnet/detect")
    names = ("txt2img", "img2img", "options", "png-info", "extra-single-image", "extra-batch-images")
    assert {*drawing, *pictures, *(f"/sdapi/v1/{name}" for name in names)} <= {
        operation.path for operation in operations if operation.method == "post"
    }
    for operation in operations:
        if mode is GenerationMode.NEGATIVE and not list(operation.body):
            continue  # nothing to get wrong

        @settings(
            max_examples=120 if list(operation.body) else 20,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(operation.as_strategy(generation_mode=mode))
        def check(case: schemathesis.Case) -> None:
            response = case.call_and_validate(timeout=HANG_S, checks=CHECKS)
            for what in (case.method, str(response.status_code)):
                seen[what] = seen.get(what, 0) + 1
            if response.status_code >= 400:
                assert response.json()["object"] == "error"

        check()


def test_there_were_five_hundred_and_pictures_among_them() -> None:
    print(seen)
    assert seen["POST"] + seen["GET"] >= 500
    assert seen["200"] >= 50
    assert seen["400"] >= 50
    assert seen["422"] >= 50
