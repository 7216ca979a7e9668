"""The jobs API over HTTP, as the client commands and the demo use it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pwd
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing
from typing import Any, Final, Self
from urllib.parse import urlsplit

import httpx

from toolfleet.cli.exits import FAILED, TRY_AGAIN, UNREACHABLE, USAGE, CliError
from toolfleet.cli.output import say
from toolfleet.cli.sse import ServerEvent, SseDecoder

TERMINAL: Final = frozenset({"completed", "failed", "cancelled", "unknown"})

REQUEST_TIMEOUT_S: Final = 15.0
"""Above every wait of the API for its own parts; a synchronous job is not run from here."""
CONNECT_TIMEOUT_S: Final = 5.0
SAY_AFTER_S: Final = 3.0
"""How long a request is waited for in silence."""
STREAM_SILENCE_S: Final = 40.0
"""The API sends a heartbeat every 15 s: more than two missing ones mean a broken stream."""
_TIMEOUT: Final = httpx.Timeout(REQUEST_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
_RECONNECT_S: Final = (0.1, 0.3, 1.0, 2.0, 5.0)
"""Waits before a broken stream is opened again; the last one repeats."""

NOT_THE_API: Final = "what answers there is not the jobs API"
_PATH: Final = "/api/v1"


class ApiRefused(CliError):
    """The API answered with a problem document."""

    def __init__(self, status: int, document: Mapping[str, Any]) -> None:
        super().__init__(_sentence(status, document), _code_of(status), document=document)
        self.status = status


class ApiUnreachable(CliError):
    """There was no answer."""

    def __init__(self, url: str, reason: str, message: str | None = None) -> None:
        super().__init__(
            message
            or f"the jobs API at {url} can't be reached ({reason}); start one with `toolfleet up`, or say where it is "
            "with --api or TOOLFLEET_API_URL",
            UNREACHABLE,
        )


class ApiSilent(ApiUnreachable):
    """Something took the connection and did not answer: to start another API would not help."""

    def __init__(self, url: str, *, changes: bool) -> None:
        """`changes` is whether it was asked for more than an answer."""
        text = f"the jobs API at {url} takes connections and does not answer in time: it hangs or is overloaded"
        if changes:
            text += "; whether it did what it was asked to is not known"
        super().__init__(url, "no answer in time", f"{text}; see its log and `toolfleet doctor`")


class JobsClient:
    """A connection to one API; an async context manager.

    Every method raises `ApiRefused` where the API says no, and `ApiUnreachable` where it says nothing.
    """

    def __init__(self, url: str, *, tell: Callable[[str], None] = say) -> None:
        """
        Args:
            url: of the API, with or without the path; ``http://host:port``.
            tell: gets a line where an answer takes long.

        Raises:
            CliError: it is no HTTP URL.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise CliError(f"'{url}' is not the URL of an API; it looks like http://127.0.0.1:8081", USAGE)
        self.url = url.rstrip("/").removesuffix("/jobs").removesuffix(_PATH)
        # A proxy of the environment is for the way out, not for this machine.
        local = parts.hostname in ("127.0.0.1", "localhost", "::1")
        self._http = httpx.AsyncClient(base_url=self.url, timeout=_TIMEOUT, trust_env=not local, headers=_who())
        self._tell = tell

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    # -- jobs --------------------------------------------------------------------------------------------------

    async def submit(self, job: Mapping[str, Any], *, key: str | None = None) -> dict[str, Any]:
        """Queue a job; `key` is its Idempotency-Key."""
        headers = {"Idempotency-Key": key} if key else None
        return (await self._call("POST", f"{_PATH}/jobs", body=job, headers=headers))[1]

    async def job(self, job_id: str) -> dict[str, Any]:
        """The job as it is now."""
        return (await self._call("GET", f"{_PATH}/jobs/{job_id}"))[1]

    async def result(self, job_id: str) -> tuple[bool, dict[str, Any]]:
        """Whether the job has ended, and its results, or how far it is."""
        status, answer = await self._call("GET", f"{_PATH}/jobs/{job_id}/result")
        return status == httpx.codes.OK, answer

    async def cancel(self, job_id: str) -> dict[str, Any]:
        """Stop a job; the answer says how far that got."""
        return (await self._call("POST", f"{_PATH}/jobs/{job_id}/cancel"))[1]

    async def retry(self, job_id: str, why: str | None = None) -> dict[str, Any]:
        """Run a failed or cancelled job again."""
        body = {"reason": why} if why else None
        return (await self._call("POST", f"{_PATH}/jobs/{job_id}/retry", body=body))[1]

    async def resolve(self, job_id: str, decision: Mapping[str, Any]) -> dict[str, Any]:
        """Decide one call of an unknown job."""
        return (await self._call("POST", f"{_PATH}/jobs/{job_id}/resolve", body=decision))[1]

    async def get(self, path: str, **query: Any) -> dict[str, Any]:
        """Any other page of the API, ``path`` as it stands below ``/api/v1``."""
        given = {name: value for name, value in query.items() if value is not None}
        return (await self._call("GET", f"{_PATH}/{path}", params=given))[1]

    async def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Any other change, ``path`` as it stands below ``/api/v1``."""
        return (await self._call("POST", f"{_PATH}/{path}", body=body))[1]

    async def ready(self) -> dict[str, Any]:
        """The API's parts, where all of them are there."""
        return (await self._call("GET", "/health/ready"))[1]

    async def events(self, job_id: str, after: int = 0) -> AsyncGenerator[ServerEvent, None]:
        """A job's events after an id, each once, to its end; a broken stream is taken up again where it broke.

        Raises:
            ApiRefused: there is no such job.
            ApiUnreachable: there was no answer before the first event. Later it is waited for.
        """
        last, failures, opened = after, 0, False
        while True:
            ended = False
            try:
                async with aclosing(self._stream(job_id, last)) as stream:
                    async for event in stream:
                        failures, opened = 0, True
                        if event.event == "gap":
                            # Where the log was made anew, it is told from an earlier place than this client's.
                            last = min(last, int(event.data.get("resumes_at", last + 1)) - 1)
                        if event.id is not None:
                            if event.id <= last:
                                continue
                            last = event.id
                        yield event
                ended = await self._is_over(job_id)
            except (httpx.HTTPError, ApiUnreachable) as error:
                if not opened:
                    raise self._unreachable(error) from error
            except ApiRefused as error:
                if not opened or error.code != TRY_AGAIN:
                    raise
            if ended:
                return
            await asyncio.sleep(_RECONNECT_S[min(failures, len(_RECONNECT_S) - 1)])
            failures += 1

    async def _stream(self, job_id: str, after: int) -> AsyncGenerator[ServerEvent, None]:
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": str(after)} if after else {})
        timeout = httpx.Timeout(REQUEST_TIMEOUT_S, connect=CONNECT_TIMEOUT_S, read=STREAM_SILENCE_S)
        url = f"{_PATH}/jobs/{job_id}/stream"
        async with contextlib.AsyncExitStack() as stack:
            with self._told_if_slow("GET", url, STREAM_SILENCE_S):
                streamed = self._http.stream("GET", url, headers=headers, timeout=timeout)
                response = await stack.enter_async_context(streamed)
            if response.status_code != httpx.codes.OK:
                await response.aread()
                raise self._refused(response)
            decoder = SseDecoder()
            async for line in response.aiter_lines():
                if (event := decoder.feed(line)) is not None:
                    yield event

    async def _is_over(self, job_id: str) -> bool:
        """An API that is shutting down ends its streams as well; only the job tells whether it has ended."""
        return (await self.job(job_id)).get("status") in TERMINAL

    async def _call(
        self,
        method: str,
        path: str,
        *,
        body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> tuple[int, dict[str, Any]]:
        try:
            with self._told_if_slow(method, path, REQUEST_TIMEOUT_S):
                response = await self._http.request(method, path, json=body, headers=headers, params=params)
        except httpx.HTTPError as error:
            raise self._unreachable(error, method) from error
        if response.is_error:
            raise self._refused(response)
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise ApiUnreachable(self.url, NOT_THE_API)
        return response.status_code, answer

    @contextlib.contextmanager
    def _told_if_slow(self, method: str, path: str, limit_s: float) -> Iterator[None]:
        text = f"waiting for the jobs API at {self.url} to answer {method} {path}, for at most {limit_s:g} s"
        timer = asyncio.get_running_loop().call_later(SAY_AFTER_S, self._tell, text)
        try:
            yield
        finally:
            timer.cancel()

    def _refused(self, response: httpx.Response) -> CliError:
        try:
            document = response.json()
        except ValueError:
            document = None
        if isinstance(document, dict):
            return ApiRefused(response.status_code, document)
        # A gateway says that something is down in a page of its own; a page that is not there is another program's.
        if response.is_server_error:
            return ApiRefused(response.status_code, {"detail": f"the way to the API failed: {response.status_code}"})
        return ApiUnreachable(self.url, NOT_THE_API)

    def _unreachable(self, error: Exception, method: str = "GET") -> ApiUnreachable:
        if isinstance(error, ApiUnreachable):
            return error
        if isinstance(error, httpx.ReadTimeout):
            return ApiSilent(self.url, changes=method != "GET")
        return ApiUnreachable(self.url, _reason(error))


def ask(url: str, question: Callable[[JobsClient], Awaitable[Any]]) -> Any:
    """What a question to the API gives, in an event loop and over a connection of its own. Raises as `JobsClient`."""

    async def run() -> Any:
        async with JobsClient(url) as client:
            return await question(client)

    return asyncio.run(run())


def _who() -> dict[str, str]:
    """The user of this system, for the logs of jobs that are decided or run again."""
    try:
        name = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        name = f"uid {os.getuid()}"
    return {"X-Toolfleet-User": name} if name.isascii() and name.isprintable() and name.strip() == name else {}


def _reason(error: Exception) -> str:
    if isinstance(error, httpx.TimeoutException):
        return "no answer in time"
    return str(error) or type(error).__name__


def _code_of(status: int) -> int:
    if status in (400, 413, 422):
        return USAGE
    return TRY_AGAIN if status in (429, 503) else FAILED


def _sentence(status: int, document: Mapping[str, Any]) -> str:
    """A problem document (RFC 9457) as one line, with the names that are near a misspelt one."""
    text = str(document.get("detail") or document.get("title") or f"the API answered with status {status}")
    nearest = document.get("nearest")
    if isinstance(nearest, list) and nearest and not all(str(name) in text for name in nearest):
        text += f"; did you mean {' or '.join(map(str, nearest))}?"
    errors = document.get("errors")
    if isinstance(errors, list):
        further = [_flat(error) for error in errors]
        further = [one for one in further if one not in text]
        text += f" ({'; '.join(further)})" if further else ""
    return " ".join(text.split())


def _flat(error: Any) -> str:
    if not isinstance(error, Mapping):
        return str(error)
    where = error.get("path") or error.get("pointer") or error.get("loc") or ""
    what = error.get("message") or error.get("detail") or error.get("msg") or json.dumps(dict(error))
    return f"{where} {what}".strip()
