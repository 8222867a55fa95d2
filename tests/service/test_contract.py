"""Requests that schemathesis makes up from the OpenAPI page, for the routes of all contracts."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import schemathesis
import tiny_service
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.config import GenerationConfig, ProjectConfig, ProjectsConfig, SchemathesisConfig
from schemathesis.core.control import SkipTest

from ldm.service.app import Service, create_app

HOST = {"Host": "localhost"}
EXAMPLES = 5  # of each route and mode
LIMITS = {"max_steps": 3, "max_pixels": 4096, "max_images": 2, "deadline": 5.0, "queue_size": 8}


@pytest.fixture(scope="module")
def app(model: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[FastAPI]:
    log = tmp_path_factory.mktemp("log") / "log.jsonl"
    with tiny_service.running(model, log_file=str(log), **LIMITS) as engine:
        yield create_app(Service(engine, engine.options))


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["valid", "invalid"])
def test_no_request_ends_in_an_error_of_the_service(app: FastAPI, mode: GenerationMode) -> None:
    generation = GenerationConfig(modes=[mode], allow_x00=True, database="none")
    projects = ProjectsConfig(default=ProjectConfig(generation=generation))
    config = SchemathesisConfig(projects=projects, seed=1)
    schema = schemathesis.openapi.from_asgi("/openapi.json", app, config=config, headers=HOST)
    seen = set()
    for operation in [found.ok() for found in schema.get_all_operations()]:

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(
            max_examples=EXAMPLES,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        def check(case: schemathesis.Case) -> None:
            response = case.call(headers=HOST)
            assert response.status_code < 500, f"{response.text[:500]} {case.as_curl_command()[:3000]}"
            assert "Traceback" not in response.text

        with suppress(SkipTest):  # nothing that is sent to such a route can be wrong
            check()
        seen.add(operation.path)
    assert seen >= {"/generate", "/score", "/v1/images/generations", "/sdapi/v1/txt2img"}
