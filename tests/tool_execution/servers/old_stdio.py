"""A stdio MCP server written by hand against the oldest protocol, with the manners of servers that are about.

    old_stdio.py [silent | strict | mute] [big-first | big-last] [slow] [noisy] [dies | late]

silent: ignores requests before the handshake. strict: exits at them. mute: never answers anything.
big-first, big-last: where the id stands in the answer of `big`. slow: takes 4 s to start.
noisy: a line on stderr for each start and each request before the handshake.
dies, late: what it does when a call of `hold` is cancelled: exits, or gives the result.
"""

from __future__ import annotations

import json
import sys
import time

VERSION = "2024-11-05"
TOOL = {"name": "old_echo", "inputSchema": {"type": "object", "properties": {"text": {"type": "string"}}}}

held: list[dict[str, object]] = []
"""Calls of `hold` that have no answer."""


def send(message: str) -> None:
    sys.stdout.write(message + "\n")
    sys.stdout.flush()


def answer(request: dict[str, object], result: object) -> None:
    send(json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": result}))


def call(request: dict[str, object]) -> None:
    params = request["params"]
    assert isinstance(params, dict)
    arguments = params.get("arguments", {})
    match params["name"]:
        case "old_echo":
            answer(request, {"content": [{"type": "text", "text": arguments["text"], "x-vendor": None}]})
        case "invalid":
            answer(request, {"content": "no list"})
        case "internal":
            send(json.dumps({"jsonrpc": "2.0", "id": request["id"], "error": {"code": -32603, "message": "it broke"}}))
        case "unreadable":
            start = f'{{"jsonrpc":"2.0","id":{request["id"]},"result":{{"content":'.encode()
            body = {"utf8": b'["\xff"]', "surrogate": b'["\\ud800"]', "nested": b"[" * 50_000 + b"]" * 50_000}
            sys.stdout.buffer.write(start + body[arguments["how"]] + b"}}\n")
            sys.stdout.buffer.flush()
        case "big":
            body = json.dumps({"content": [{"type": "text", "text": 'a "id":3} b' * arguments["size"]}]})
            if "big-last" in sys.argv:
                send(f'{{"result":{body},"id":{request["id"]}}}')
            else:
                send(f'{{"jsonrpc":"2.0","id":{request["id"]},"result":{body}}}')
        case "exit":
            sys.exit(1)
        case "hold":
            held.append(request)
            token = params["_meta"]["progressToken"]
            told = {"progressToken": token, "progress": 1}
            send(json.dumps({"jsonrpc": "2.0", "method": "notifications/progress", "params": told}))
        case name:
            error = {"code": -32602, "message": f"no tool {name}"}
            send(json.dumps({"jsonrpc": "2.0", "id": request["id"], "error": error}))


def take_back(message: dict[str, object]) -> None:
    if message.get("method") != "notifications/cancelled":
        return
    if "dies" in sys.argv:
        sys.exit(0)
    if "late" in sys.argv:
        answer(held.pop(), {"content": []})


def main() -> None:
    ready = False
    if "noisy" in sys.argv:
        print("old starts", file=sys.stderr, flush=True)
    if "slow" in sys.argv:
        time.sleep(4)
    for line in sys.stdin:
        request = json.loads(line)
        take_back(request)
        if "mute" in sys.argv or "id" not in request:
            continue
        method = request["method"]
        if not ready and "noisy" in sys.argv:
            print(f"old is asked {method}", file=sys.stderr, flush=True)
        if method == "initialize":
            ready = True
            info = {"name": "old", "version": "1"}
            answer(request, {"protocolVersion": VERSION, "capabilities": {"tools": {}}, "serverInfo": info})
        elif not ready and "strict" in sys.argv:
            sys.exit(1)
        elif not ready and "silent" in sys.argv:
            continue
        elif method == "tools/list":
            page = (request.get("params") or {}).get("cursor")
            tools = [TOOL] if page is None else [{**TOOL, "name": "second_page"}]
            answer(request, {"tools": tools, **({"nextCursor": "2"} if page is None else {})})
        elif method == "tools/call":
            call(request)
        elif method == "ping":
            answer(request, {})
        else:
            error = {"code": -32601, "message": "no such method"}
            send(json.dumps({"jsonrpc": "2.0", "id": request["id"], "error": error}))


if __name__ == "__main__":
    main()
