"""Runs one stdio MCP server and takes it, and all that it started, down with the worker.

Run as a script by `stdio_process`, with the standard library only and without `site`, so that it starts in a few
milliseconds and the server's environment (PYTHONPATH and the like) is none of its business::

    python -I -S stdio_launcher.py LIFELINE -- command [argument ...]

`LIFELINE` is the read end of a pipe whose write end only the worker holds. The kernel closes it when the worker dies,
SIGKILL included, so its end of file means: stop the server. A process cannot do that for itself by replacing itself
(`exec`) and `PR_SET_PDEATHSIG`: its own children would live on. So the launcher stays beside the server, as the parent
of its process group and, on Linux, as the one to whom the kernel hands processes that left the group.

It exits with the server's exit code (128 + n for signal n), 127 where the command could not be run.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import time

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
"""Both from linux/prctl.h."""

_GRACE_S = 1.0
"""Between SIGTERM and SIGKILL."""
_REAP_S = 2.0
"""For killed processes to be gone; only one in an uninterruptible system call takes longer."""


def main(arguments: list[str]) -> int:
    """Runs the command to its end, or ends it. Returns the exit code."""
    lifeline, command = int(arguments[0]), arguments[2:]
    os.set_inheritable(lifeline, False)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    wake = _wake_on_signals()
    server = _start(command)
    _let_go_of_pipes()
    status = _wait(server, lifeline, wake)
    if status is None:
        status = _end(server, wake)
    _kill_the_rest(server)
    return os.waitstatus_to_exitcode(status) & 0xFF if os.WIFEXITED(status) else 128 + os.WTERMSIG(status)


_stop_asked = False


def _wake_on_signals() -> int:
    """Makes SIGCHLD and the signals that ask for an end readable from a descriptor, so that one poll sees all."""

    def ask_to_stop(_number: int, _frame: object) -> None:
        global _stop_asked
        _stop_asked = True

    readable, writable = os.pipe()
    os.set_blocking(readable, False)
    os.set_blocking(writable, False)
    signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, ask_to_stop)
    return readable


def _start(command: list[str]) -> int:
    """Starts the server in a process group of its own; its process id, which is the group's id as well."""
    launcher = os.getpid()
    server = os.fork()
    if server:
        with contextlib.suppress(OSError):  # the child does the same; whoever comes second finds it done
            os.setpgid(server, server)
        return server
    try:
        os.setpgid(0, 0)
        # Should somebody kill the launcher itself, the server at least does not stay.
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != launcher:
            os._exit(1)
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # ignored by Python, and ignoring survives exec
            signal.signal(number, signal.SIG_DFL)
        os.execvp(command[0], command)  # noqa: S606 - the operator's configured command; no shell is wanted
    except OSError as error:
        os.write(2, f"cannot run {command[0]}: {error.strerror}\n".encode())
    finally:
        os._exit(127)


def _let_go_of_pipes() -> None:
    """Leaves stdin and stdout to the server alone: held here as well, neither side would see the other's end."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)


def _wait(server: int, lifeline: int, wake: int) -> int | None:
    """Waits for the server's end and returns its wait status; None when the server is to be ended."""
    poll = select.poll()
    poll.register(lifeline, select.POLLIN | select.POLLHUP)
    poll.register(wake, select.POLLIN)
    while True:
        ready = {descriptor for descriptor, _ in poll.poll()}
        _drain(wake)
        status = _reap(server)
        if status is not None:
            return status
        if lifeline in ready or _stop_asked:
            return None


def _end(server: int, wake: int) -> int:
    """SIGTERM to the server's group, SIGKILL after the grace; the server's wait status."""
    _signal_group(server, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE_S
    poll = select.poll()
    poll.register(wake, select.POLLIN)
    while (left := deadline - time.monotonic()) > 0:
        poll.poll(left * 1000)
        _drain(wake)
        status = _reap(server)
        if status is not None:
            return status
    _signal_group(server, signal.SIGKILL)
    return os.waitpid(server, 0)[1]


def _kill_the_rest(server: int) -> None:
    """Ends what the server left: its group, and processes that left the group and became this one's children."""
    _signal_group(server, signal.SIGKILL)
    deadline = time.monotonic() + _REAP_S
    while time.monotonic() < deadline:
        for child in _children():
            with contextlib.suppress(OSError):
                os.kill(child, signal.SIGKILL)
        try:
            ended, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not ended:
            time.sleep(0.005)


def _children() -> list[int]:
    """Process ids of this process's children; none where the kernel does not tell."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as listing:  # noqa: PTH123 - pathlib costs 5 ms to import
            return [int(pid) for pid in listing.read().split()]
    except OSError:
        return []


def _reap(server: int) -> int | None:
    """Collects ended children; the server's wait status if it is among them."""
    found = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == server:
            found = status
        elif not pid:
            return found


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(OSError):  # nobody is left in it
        os.killpg(group, number)


def _drain(descriptor: int) -> None:
    with contextlib.suppress(BlockingIOError):
        while os.read(descriptor, 512):
            pass


def _prctl(option: int, value: int) -> None:
    """Linux's prctl; other systems have no such call and go without."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
