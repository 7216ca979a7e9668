"""An MCP server with tools that do what tests need; a script, run by the project's Python and by that of the peers.

It runs on both releases of the SDK, so one set of tools is served under the current protocol and under older ones.

    toolbox.py stdio NOTES
    toolbox.py http NOTES PORT [legacy-json]     prints the port that it listens on

NOTES is a file to which tools append JSON lines: what reached the server, for tests that ask the server itself.
"""

# mypy: disable-error-code="untyped-decorator,attr-defined,no-redef,import-not-found"
# The SDK's two releases have no types in common.

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import anyio

try:
    from mcp.server.mcpserver import Context, Image, MCPServer
    from mcp.server.mcpserver.exceptions import ToolError
except ImportError:  # the previous release of the SDK, in the environment of the peers
    from mcp.server.fastmcp import Context, Image
    from mcp.server.fastmcp import FastMCP as MCPServer
    from mcp.server.fastmcp.exceptions import ToolError

from mcp.types import ToolAnnotations

PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360606060000000050001a5f64540"
    "0000000049454e44ae426082"
)

app: Any = MCPServer("toolbox")
notes_path = ""


def note(**entry: object) -> None:
    with Path(notes_path).open("a") as notes:
        notes.write(json.dumps({"pid": os.getpid(), **entry}) + "\n")


@app.tool(annotations=ToolAnnotations(readOnlyHint=True))
def echo(text: str) -> str:
    """Gives the text back."""
    return text


@app.tool(annotations=ToolAnnotations(idempotentHint=True))
def add(a: int, b: int) -> dict[str, int]:
    """Adds; structured."""
    return {"sum": a + b}


@app.tool()
def once(label: str) -> str:
    """Says nothing about itself, so it must not run twice."""
    note(event="once", label=label)
    return label


@app.tool(structured_output=False)
def picture() -> list[Any]:
    """A text and an image."""
    return ["one pixel", Image(data=PIXEL, format="png")]


@app.tool()
def refuse(reason: str) -> str:
    """Fails with a reason."""
    raise ToolError(reason)


@app.tool()
def keep(value: Any) -> str:
    """The arguments as they arrived."""
    return json.dumps(value)


@app.tool()
def about(ctx: Context) -> str:
    """The `_meta` of the call, and the server's process id."""
    meta: Any = ctx.request_context.meta
    return json.dumps({"meta": meta if isinstance(meta, dict) else meta.model_dump(), "pid": os.getpid()})


@app.tool()
async def steps(count: int, ctx: Context) -> str:
    """Reports progress."""
    for step in range(1, count + 1):
        await ctx.report_progress(step, count, f"step {step}")
    return "done"


@app.tool()
async def flood(label: str, ctx: Context) -> str:
    """Reports progress without a pause until it is cancelled, and takes a note of both."""
    note(event="started", label=label)
    step = 0
    try:
        while True:
            step += 1
            await ctx.report_progress(step, None, f"step {step}")
    except anyio.get_cancelled_exc_class():
        note(event="cancelled", label=label)
        raise


@app.tool()
async def raw_progress(lines: list[str], times: int, ctx: Context) -> str:
    """Writes progress to stdout by hand, as fast as a program in C would: `params` without the token, in JSON."""
    meta: Any = ctx.request_context.meta
    token = meta["progress_token"] if isinstance(meta, dict) else meta.progressToken
    head = f'{{"jsonrpc":"2.0","method":"notifications/progress","params":{{"progressToken":{token},'
    for step in range(1, times + 1):
        text = "".join(head + line.replace("STEP", str(step)) + "}}\n" for line in lines)
        data = text.encode()
        while data:
            data = data[os.write(1, data) :]
    return "done"


@app.tool()
async def hang(label: str) -> str:
    """Waits until it is cancelled, and takes a note of both."""
    note(event="started", label=label)
    try:
        await anyio.sleep(3600)
    except anyio.get_cancelled_exc_class():
        note(event="cancelled", label=label)
        raise
    return "never"


@app.tool()
async def stubborn(label: str, path: str) -> str:
    """Goes on although it is cancelled, until a file exists."""
    note(event="started", label=label)
    with anyio.CancelScope(shield=True):
        while not Path(path).exists():
            await anyio.sleep(0.01)
    note(event="ended", label=label)
    return "done"


@app.tool()
async def wait_for(path: str) -> str:
    """Answers once a file exists."""
    note(event="waiting", label=path)
    while not Path(path).exists():
        await anyio.sleep(0.01)
    return "there"


@app.tool()
def crash() -> str:
    """Ends the process without an answer."""
    note(event="crashing")
    os._exit(3)


@app.tool()
async def freeze() -> str:
    """Blocks the whole server."""
    note(event="frozen")
    time.sleep(3600)
    return "never"


@app.tool()
def big(size: int) -> str:
    """A text of many characters."""
    return "x" * size


@app.tool()
def family() -> str:
    """Starts a child in this process group and one in a session of its own that ignores SIGTERM."""
    near = subprocess.Popen(["sleep", "3600"])
    far = subprocess.Popen(
        ["sleep", "3600"],
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN),
        stdout=subprocess.DEVNULL,
    )
    return json.dumps([os.getpid(), near.pid, far.pid])


@app.tool()
async def ask(ctx: Context) -> str:
    """Asks the client's user."""
    from pydantic import BaseModel

    class Answer(BaseModel):
        name: str

    answer = await ctx.elicit("who are you?", Answer)
    return str(answer.action)


@app.tool()
def bad_stdout() -> str:
    """Writes what is no message to stdout, where only messages belong."""
    os.write(1, b'a line of text\n{"jsonrpc": "2.0", "what": 1}\n\xff\xfe\n\n[1, 2]\n')
    return "wrote"


def serve_http(port: int, options: dict[str, Any]) -> None:
    import uvicorn

    if hasattr(app, "streamable_http_app") and "json_response" in options and hasattr(app.settings, "json_response"):
        app.settings.json_response = options.pop("json_response")
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(2048)
    print(listener.getsockname()[1], flush=True)
    config = uvicorn.Config(app.streamable_http_app(**options), log_level="warning", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    notes_path = sys.argv[2]
    note(event="process", transport=sys.argv[1])
    if sys.argv[1] == "stdio":
        print("toolbox starts", file=sys.stderr, flush=True)
        app.run("stdio")
    else:
        serve_http(int(sys.argv[3]), {"json_response": True} if "json" in sys.argv[4:] else {})
