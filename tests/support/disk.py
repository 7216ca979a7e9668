"""A server whose disk takes no more, without root and without a disk of its own.

The limit is that of the kernel on the size of one file: a write beyond it fails as on a full disk (EFBIG in place of
ENOSPC), in the midst of a record as there. It can be lifted while the server runs. Servers are started by Python, which
ignores the signal that would come with it, and leave that as it is.
"""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator


def fill(pid: int, file_bytes: int) -> None:
    """From now on no file of this process can grow beyond so many bytes."""
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (file_bytes, resource.RLIM_INFINITY))


def make_room(pid: int) -> None:
    """Files may grow again; a process that has ended needs no room."""
    with contextlib.suppress(ProcessLookupError):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@contextlib.contextmanager
def full_disk(pid: int, file_bytes: int) -> Iterator[None]:
    """`fill` until the context is left."""
    fill(pid, file_bytes)
    try:
        yield
    finally:
        make_room(pid)
