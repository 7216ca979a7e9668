"""`python -m toolfleet.services.web_tools`: the tool server as a process of its own.

Over HTTP it ends on SIGTERM or SIGINT: new crawls are refused, running ones have `web_drain_timeout` to end, and the
exit code is 0. A second signal cuts the wait short.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from toolfleet.services.web_tools.server import build_server, serve_web_tools
from toolfleet.settings import Settings

log = logging.getLogger("toolfleet.web_tools")

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server until it is told to stop.

    Returns:
        The exit code: 0 after a stop, 1 where it cannot listen, 2 for settings that do not parse.
    """
    options = _parse(argv)
    try:
        settings = _settings(options)
    except ValidationError as error:
        print(f"web_tools: a setting is not valid: {error}", file=sys.stderr)
        return 2
    _configure_logging(settings.log_level)
    try:
        asyncio.run(_run_stdio(settings) if options.stdio else _run_http(settings, options.ready_file))
    except OSError as error:
        print(f"web_tools: {error.strerror or error}", file=sys.stderr)
        return 1
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m toolfleet.services.web_tools", description="The web_crawl server.")
    parser.add_argument("--stdio", action="store_true", help="speak MCP over stdin and stdout instead of HTTP")
    parser.add_argument("--host", help="address to listen on (TOOLFLEET_WEB_HOST)")
    parser.add_argument("--port", type=int, help="port to listen on, 0 for a free one (TOOLFLEET_WEB_PORT)")
    parser.add_argument("--ready-file", type=Path, help="gets the server's URL once it listens; removed at the end")
    parser.add_argument(
        "--allow-private", action="store_true", help="let web_crawl fetch private and loopback addresses"
    )
    return parser.parse_args(argv)


def _settings(options: argparse.Namespace) -> Settings:
    given: dict[str, Any] = {}
    if options.host is not None:
        given["web_host"] = options.host
    if options.port is not None:
        given["web_port"] = options.port
    if options.allow_private:
        given["web_allow_private"] = True
    return Settings(**given)


def _configure_logging(level: str) -> None:
    # To stderr: with --stdio, stdout is the wire.
    layout = "%(asctime)s %(levelname)s %(name)s %(message)s"
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format=layout)
    logging.getLogger("toolfleet").setLevel(level.upper())
    # It warns of every page without much text, which is nothing an operator can act on.
    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)


async def _run_http(settings: Settings, ready_file: Path | None) -> None:
    stop, hurry = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (hurry if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for signum in _STOP_SIGNALS:
        loop.add_signal_handler(signum, on_signal)
    async with serve_web_tools(settings) as running:
        log.info("web tools listen on %s", running.url)
        with _published(ready_file, running.url):
            await _first_of(stop.wait(), running.hosted.ended())
            log.info("stopping; %d crawls still run", running.tool.active)
            with suppress(TimeoutError):
                async with asyncio.timeout(settings.web_drain_timeout):
                    await _first_of(running.drain(), hurry.wait())
            running.hosted.close_as_on_signal(signal.SIGTERM)


async def _run_stdio(settings: Settings) -> None:
    loop = asyncio.get_running_loop()
    for signum in _STOP_SIGNALS:
        # At once and without clean-up: the SDK reads stdin in a thread that nothing can interrupt, so an orderly end
        # would wait for the client's next line. There is nothing to save, a crawl only reads.
        loop.add_signal_handler(signum, os._exit, 0)
    await build_server(settings).run_stdio_async()


async def _first_of(*waits: Any) -> None:
    """Return when the first of the coroutines does, raising what it raised; the others are cancelled."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextmanager
def _published(path: Path | None, url: str) -> Iterator[None]:
    """Keep the URL in the file meanwhile. Written whole: whoever waits for it may read it the moment it appears."""
    if path is None:
        yield
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(url + "\n", encoding="utf-8")
    partial.replace(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
