"""The OpenAPI description against a running API: nothing undocumented is answered, and nothing breaks it."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from redis import Redis
from schemathesis.config import SchemathesisConfig

from tests.api.harness import BOUND_S, JOBS
from toolfleet.api.app import create_app
from toolfleet.services.embedded.nats_server import EmbeddedNats
from toolfleet.services.embedded.valkey_server import EmbeddedValkey
from toolfleet.settings import Settings

PROBLEM = "application/problem+json"

# Names of tools, ids of jobs and their states are beyond a schema: a valid request may well be refused for them.
REFUSALS = ["2xx", "404", "409", "410", "422"]

CONFIG: dict[str, Any] = {
    "generation": {"deterministic": True, "database": "none"},
    "checks": {
        "positive_data_acceptance": {"expected-statuses": REFUSALS},
        "negative_data_rejection": {"expected-statuses": ["404", "405", "413", "415", "422"]},
    },
}


@dataclass(frozen=True)
class LiveApi:
    """An API in a process, since schemathesis and Hypothesis are not asynchronous."""

    url: str
    jobs: dict[str, str]
    """The id of an ended job of each terminal status."""
    letters: list[str]
    """Ids of dead letters: of jobs, and of malformed messages."""


@pytest.fixture(scope="module")
def live_api(
    nats_server: EmbeddedNats, valkey_server: EmbeddedValkey, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LiveApi]:
    with Redis.from_url(valkey_server.url) as redis:
        redis.flushall()
    settings = {
        "nats_url": nats_server.url,
        "redis_url": valkey_server.url,
        "stream": "OPENAPI",
        "subject_prefix": "openapi",
        "dlq_stream": "OPENAPI_DLQ",
        "dlq_subject_prefix": "openapi-dlq",
        "stream_max_bytes": 16 << 20,
        "dlq_max_bytes": 1 << 20,
    }
    log_path = tmp_path_factory.mktemp("live-api") / "log"
    read_end, write_end = os.pipe()
    command = [sys.executable, "-m", "tests.api.live_stack", json.dumps(settings), str(write_end)]
    with log_path.open("wb") as log, os.fdopen(read_end) as said:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, pass_fds=[write_end]
        )
        os.close(write_end)
        try:
            # The end of the process closes the pipe, so this ends either way.
            line = said.readline()
            assert line, f"the API did not come up:\n{log_path.read_text()}"
            yield LiveApi(**json.loads(line))
        finally:
            process.communicate(timeout=BOUND_S)
    assert process.returncode == 0, log_path.read_text()
    assert "Traceback" not in log_path.read_text(), log_path.read_text()


# The description needs no server, so that every operation is a test of its own; requests go to `live_api`.
api = schemathesis.openapi.from_dict(create_app(Settings()).openapi(), config=SchemathesisConfig.from_dict(CONFIG))
bounded = settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
_turns = itertools.count()


@api.parametrize()
@bounded
def test_every_operation_answers_as_described(case: schemathesis.Case, live_api: LiveApi) -> None:
    case.call_and_validate(base_url=live_api.url, timeout=BOUND_S)


@api.include(path_regex="job_id").parametrize()
@bounded
def test_operations_on_jobs_that_are_there_answer_as_described(case: schemathesis.Case, live_api: LiveApi) -> None:
    ids = list(live_api.jobs.values())
    case.path_parameters["job_id"] = ids[next(_turns) % len(ids)]
    case.call_and_validate(base_url=live_api.url, timeout=BOUND_S)


@api.include(path_regex="letter_id").parametrize()
@bounded
def test_operations_on_letters_that_are_there_answer_as_described(case: schemathesis.Case, live_api: LiveApi) -> None:
    case.path_parameters["letter_id"] = live_api.letters[next(_turns) % len(live_api.letters)]
    case.call_and_validate(base_url=live_api.url, timeout=BOUND_S)


def test_every_answer_and_every_error_is_documented() -> None:
    description = create_app(Settings()).openapi()
    ids = []
    for path, operations in description["paths"].items():
        for method, operation in operations.items():
            ids.append(operation["operationId"])
            assert operation["tags"], path
            assert operation["summary"], path
            answers = operation["responses"]
            assert "500" in answers, (method, path)
            assert "default" not in answers
            for status, answer in answers.items():
                assert answer["description"], (method, path, status)
                if int(status) >= 400:
                    assert set(answer["content"]) == {PROBLEM}, (method, path, status)
                if status in ("429", "503"):
                    assert "Retry-After" in answer["headers"], (method, path, status)
    assert len(ids) == len(set(ids)) == 19
    submit_answers = description["paths"][JOBS]["post"]["responses"]
    assert set(submit_answers) == {"200", "202", "413", "415", "422", "429", "500", "503"}
    assert all("Idempotency-Key" in submit_answers[s]["headers"] for s in submit_answers if s != "500")
    assert {"Location", "Idempotency-Key"} <= submit_answers["202"]["headers"].keys()
    stream = description["paths"][f"{JOBS}/{{job_id}}/stream"]["get"]["responses"]["200"]
    assert set(stream["content"]) == {"text/event-stream"}
    assert "HTTPValidationError" not in description["components"]["schemas"]
