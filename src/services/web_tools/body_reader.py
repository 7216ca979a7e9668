"""A response body, unpacked within a bound.

The unpacking is done here and not by httpx: httpx unpacks a whole network chunk before anybody can count, and 64 KiB
of gzip can hold 64 MiB. Only gzip and deflate are asked for, since zlib is the one that stops at a given size.
"""

from __future__ import annotations

import zlib
from typing import Protocol

import httpx

from toolfleet.services.web_tools.errors import FetchFailedError
from toolfleet.services.web_tools.models import SkipCode

ACCEPT_ENCODING = "gzip, deflate"
_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS
"""zlib: detect the gzip or zlib header; the values are those of `inflateInit2`."""


class _Unpacker(Protocol):
    def unpack(self, chunk: bytes, room: int) -> bytes:
        """At most `room` bytes of what `chunk` holds, room above zero."""
        ...


class _AsIs:
    def unpack(self, chunk: bytes, room: int) -> bytes:
        return chunk[:room]


class _Inflate:
    def __init__(self) -> None:
        self._zlib = zlib.decompressobj(wbits=_GZIP_OR_ZLIB)

    def unpack(self, chunk: bytes, room: int) -> bytes:
        if self._zlib.eof:
            return b""
        try:
            return self._zlib.decompress(chunk, room)
        except zlib.error as error:
            raise FetchFailedError(SkipCode.CONTENT, f"its compressed body is damaged: {error}") from error


def _unpacker_for(content_encoding: str) -> _Unpacker:
    match content_encoding.strip().lower():
        case "" | "identity":
            return _AsIs()
        case "gzip" | "x-gzip" | "deflate":
            return _Inflate()
        case other:
            raise FetchFailedError(SkipCode.CONTENT, f"it came in the encoding {other!r}, which was not asked for")


async def read_body(response: httpx.Response, max_bytes: int, *, cut: bool = False) -> bytes:
    """The unpacked body of a streamed response.

    Args:
        response: opened with `stream`, nothing read yet.
        max_bytes: of the body as sent and as unpacked, each.
        cut: answer with the first `max_bytes` bytes instead of refusing a longer body.

    Raises:
        FetchFailedError: `TOO_LARGE`; `CONTENT` for an encoding that was not asked for or does not unpack.
        httpx.TransportError: the connection broke.
    """
    unpacker = _unpacker_for(response.headers.get("content-encoding", ""))
    declared = response.headers.get("content-length", "")
    if not cut and declared.isdigit() and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    body = bytearray()
    received = 0
    async for chunk in response.aiter_raw():
        received += len(chunk)
        # One byte more than there is room for tells 'exactly full' from 'too large'.
        body += unpacker.unpack(chunk, max_bytes - len(body) + 1)
        if len(body) > max_bytes or received > max_bytes:
            if not cut:
                raise _too_large(max_bytes)
            return bytes(body[:max_bytes])
    return bytes(body)


def _too_large(max_bytes: int) -> FetchFailedError:
    return FetchFailedError(
        SkipCode.TOO_LARGE,
        f"it is larger than {max_bytes} bytes; TOOLFLEET_WEB_MAX_PAGE_BYTES on the tool server sets the limit",
    )
