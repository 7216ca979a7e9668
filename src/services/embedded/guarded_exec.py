"""Becomes another program that dies with the process that started it; Linux only.

Run as a script by `process.ChildProcess`, with the parent's pid and the command as arguments. The kernel is asked to
kill this process when its parent goes away, then the command takes this process over. A script of its own and not
`preexec_fn`, since that runs Python between fork and exec, where a thread of the parent may hold any lock.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
"""From linux/prctl.h."""


def main(arguments: list[str]) -> None:
    """Replaces this process by ``arguments[1:]``; exits with 127 and a message where that program cannot be run."""
    parent, command = int(arguments[0]), arguments[1:]
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # The parent may have died before the request was made; then no signal will ever come.
    if os.getppid() != parent:
        sys.exit(1)
    try:
        os.execv(command[0], command)  # noqa: S606 - no shell is wanted; the caller passes an absolute path
    except OSError as error:
        sys.exit(f"cannot run {command[0]}: {error.strerror}")


if __name__ == "__main__":
    main(sys.argv[1:])
