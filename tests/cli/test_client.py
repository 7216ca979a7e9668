"""The client's way through a stream that breaks, against a server that breaks it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import httpx
import pytest

from toolfleet.cli import client as client_module
from toolfleet.cli.client import ApiRefused, ApiUnreachable, JobsClient
from toolfleet.cli.exits import FAILED, TRY_AGAIN, UNREACHABLE, USAGE, CliError
from toolfleet.cli.sse import ServerEvent, SseDecoder

Answer = Callable[[str, dict[str, str]], bytes]
"""From path and headers to all that is sent before the connection is closed."""


def decoded(text: str) -> list[ServerEvent]:
    decoder = SseDecoder()
    return [event for line in text.split("\n") if (event := decoder.feed(line)) is not None]


def test_events_comments_and_several_lines_of_data() -> None:
    progress = 'id: 7\nevent: tool.progress\ndata: {"a":\ndata: 1}\n\n'
    gap = 'event:gap\ndata:{"after":1}\n\n'
    assert decoded(f": heartbeat\n\n{progress}retry: 5\n\n{gap}") == [
        ServerEvent(7, "tool.progress", {"a": 1}),
        ServerEvent(None, "gap", {"after": 1}),
    ]


def test_an_event_that_is_not_complete_is_not_told() -> None:
    assert decoded('id: 1\nevent: job.queued\ndata: {"a": 1}') == []


def test_data_that_is_no_object_is_kept() -> None:
    assert decoded("data: 5\n\ndata: words\n\n") == [
        ServerEvent(None, "message", {"value": 5}),
        ServerEvent(None, "message", {"text": "words"}),
    ]


@asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[JobsClient]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
        writer.write(answer(head[0].split()[1], headers))
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server, JobsClient(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as client:
        yield client


def page(status: int, document: object, kind: str = "application/json") -> bytes:
    body = json.dumps(document).encode()
    head = f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode() + body


def stream(*events: tuple[int, str], broken: bool = False) -> bytes:
    """A stream of these events; a broken one ends in the middle of a chunk."""
    text = "".join(f'id: {number}\nevent: {kind}\ndata: {{"n": {number}}}\n\n' for number, kind in events)
    head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunk = f"{len(text):x}\r\n{text}\r\n" if text else ""
    return (head + chunk + ("ff\r\nid: 99" if broken else "0\r\n\r\n")).encode()


async def test_a_broken_stream_is_taken_up_where_it_broke() -> None:
    asked: list[str | None] = []

    def answer(path: str, headers: dict[str, str]) -> bytes:
        if not path.endswith("/stream"):
            return page(200, {"status": "completed" if len(asked) == 3 else "running"})
        asked.append(headers.get("last-event-id"))
        if len(asked) == 1:
            return stream((1, "job.queued"), (2, "job.started"), broken=True)
        if len(asked) == 2:
            # As a server that shuts down: an end in order, although the job goes on; with an event told before.
            return stream((2, "job.started"), (3, "tool.started"))
        return stream((4, "job.completed"))

    async with serving(answer) as client:
        told = [event.id async for event in client.events("job_x")]
    assert told == [1, 2, 3, 4]
    assert asked == [None, "2", "3"]


async def test_a_stream_of_an_older_generation_goes_on_after_its_terminal_event() -> None:
    def answer(path: str, headers: dict[str, str]) -> bytes:
        if not path.endswith("/stream"):
            return page(200, {"status": "completed"})
        return stream((1, "job.failed"), (2, "job.queued"), (3, "job.completed"))

    async with serving(answer) as client:
        assert [event.id async for event in client.events("job_x")] == [1, 2, 3]


async def test_a_log_that_was_made_anew_is_told_from_its_beginning() -> None:
    gap = b'event: gap\ndata: {"after": 7, "resumes_at": 1}\n\nid: 1\nevent: job.queued\ndata: {}\n\n'
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"

    def answer(path: str, headers: dict[str, str]) -> bytes:
        return head + gap if path.endswith("/stream") else page(200, {"status": "completed"})

    async with serving(answer) as client:
        assert [(event.event, event.id) async for event in client.events("job_x", 7)] == [
            ("gap", None),
            ("job.queued", 1),
        ]


@pytest.mark.parametrize(
    ("status", "document", "code", "says"),
    [
        (422, {"detail": "no tool 'x'", "nearest": ["web_crawl"]}, USAGE, "no tool 'x'; did you mean web_crawl?"),
        (
            422,
            {"detail": "two\nlines", "errors": [{"path": "$.a", "message": "is bad"}]},
            USAGE,
            "two lines ($.a is bad)",
        ),
        (404, {"detail": "there is no job"}, FAILED, "there is no job"),
        (503, {"title": "Queue unavailable"}, TRY_AGAIN, "Queue unavailable"),
        (502, "<html>", FAILED, "the way to the API failed: 502"),
        (404, "<html>", UNREACHABLE, "not the jobs API"),
        (200, ["not", "an object"], UNREACHABLE, "not the jobs API"),
    ],
)
async def test_a_refusal_is_one_line_and_an_exit_code(status: int, document: object, code: int, says: str) -> None:
    async with serving(lambda path, headers: page(status, document)) as client:
        with pytest.raises(CliError) as caught:
            await client.job("job_x")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.code == code


async def test_a_stream_of_no_job_is_not_asked_for_again() -> None:
    asked: list[str] = []

    def answer(path: str, headers: dict[str, str]) -> bytes:
        asked.append(path)
        return page(404, {"detail": "there is no job"}, "application/problem+json")

    async with serving(answer) as client:
        with pytest.raises(ApiRefused):
            [event async for event in client.events("job_x")]
    assert len(asked) == 1


async def test_an_api_that_hangs_is_told_of_and_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "SAY_AFTER_S", 0.01)
    monkeypatch.setattr(client_module, "_TIMEOUT", httpx.Timeout(0.5))
    told: list[str] = []

    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(hang, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, JobsClient(url, tell=told.append) as client:
        with pytest.raises(ApiUnreachable, match="does not answer in time") as read:
            await client.job("job_x")
        with pytest.raises(ApiUnreachable, match="whether it did what it was asked to is not known"):
            await client.cancel("job_x")
    assert read.value.code == UNREACHABLE
    assert [line.partition(" for at most")[0] for line in told] == [
        f"waiting for the jobs API at {url} to answer GET /api/v1/jobs/job_x,",
        f"waiting for the jobs API at {url} to answer POST /api/v1/jobs/job_x/cancel,",
    ]


async def test_an_api_that_is_not_there_is_said_at_once() -> None:
    async with JobsClient("http://127.0.0.1:1") as client:
        with pytest.raises(ApiUnreachable, match="--api or TOOLFLEET_API_URL"):
            [event async for event in client.events("job_x")]


@pytest.mark.parametrize("url", ["127.0.0.1:8081", "ftp://host", "http://", ""])
def test_what_is_no_url_is_a_usage_error(url: str) -> None:
    with pytest.raises(CliError) as caught:
        JobsClient(url)
    assert caught.value.code == USAGE


@pytest.mark.parametrize("path", ["", "/", "/api/v1", "/api/v1/jobs", "/api/v1/jobs/"])
def test_the_path_of_the_api_may_be_given_as_well(path: str) -> None:
    assert JobsClient(f"http://127.0.0.1:8081{path}").url == "http://127.0.0.1:8081"
