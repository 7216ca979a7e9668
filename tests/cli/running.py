"""The installed command line as a process, and what it leaves behind."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import sysconfig
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from toolfleet.cli.main import main
from toolfleet.settings import variable_names

PROGRAM = str(Path(sysconfig.get_path("scripts")) / "toolfleet")
MARK = "CLI_TEST_MARK"
TIMEOUT = 60.0
"""Generous: it only bounds a failing test."""


def clean_env(**more: str) -> dict[str, str]:
    """This environment without anything that toolfleet, or a terminal library, reads."""
    ours = variable_names() | {"FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS"}
    return {name: value for name, value in os.environ.items() if name not in ours} | more


@dataclass(frozen=True)
class Ended:
    """A process that has ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """What it printed, which has to be JSON and nothing else."""
        return json.loads(self.out)

    @property
    def lines(self) -> list[Any]:
        """What it printed, one JSON object a line."""
        return [json.loads(line) for line in self.out.splitlines()]


def toolfleet(*arguments: str, env: Mapping[str, str] | None = None, stdin: str = "") -> Ended:
    """Run the program to its end; nothing it does may end in a traceback."""
    found = subprocess.run(
        [PROGRAM, *arguments],
        env=clean_env() if env is None else dict(env),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    ended = Ended(found.returncode, found.stdout, found.stderr)
    assert "Traceback" not in ended.err, ended.err
    return ended


def in_process(*arguments: str, env: Mapping[str, str], stdin: str = "") -> Ended:
    """The same without a process of its own: what many tests need is not the start of another Python."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.dict(os.environ, env, clear=True),
        mock.patch.object(sys, "argv", ["toolfleet", *arguments]),
        mock.patch.object(sys, "stdin", io.StringIO(stdin)),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    code = ended.value.code
    return Ended(code if isinstance(code, int) else 0, out.getvalue(), err.getvalue())


class Marked:
    """A process in the background whose whole family can be found again, and a TMPDIR of its own."""

    def __init__(self, tmp: Path, *arguments: str, env: Mapping[str, str] | None = None) -> None:
        self.mark = uuid.uuid4().hex
        self.tmp = tmp / "tmpdir"
        self.tmp.mkdir()
        self._lines: list[str] = []
        self.popen = subprocess.Popen(
            [PROGRAM, *arguments],
            env=clean_env(TMPDIR=str(self.tmp), **{MARK: self.mark}, **(env or {})),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    @property
    def text(self) -> str:
        """Its output, as far as it has been read."""
        return "".join(self._lines)

    def read_until(self, text: str) -> None:
        """Read its output up to a line with this text."""
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self._lines.append(line)
            if text in line:
                return
        raise AssertionError(f"it ended without {text!r}: {self.text}")

    def end(self) -> Ended:
        """Wait for its end; all of its output, stderr included, is `out`."""
        rest, _ = self.popen.communicate(timeout=TIMEOUT)
        return Ended(self.popen.returncode, self.text + (rest or ""), "")

    def family(self, *, containing: str = "") -> dict[int, str]:
        """The processes that it started and that live, itself included: pid to command line.

        They have its mark in their environment, or, where a server writes over that, run in its TMPDIR.
        """
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                marked = f"{MARK}={self.mark}".encode() in (folder / "environ").read_bytes().split(b"\0")
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if (marked or str(self.tmp) in str((folder / "cwd").readlink())) and containing in command:
                    found[int(folder.name)] = command
            except OSError:
                # It ended while it was looked at, or is a zombie.
                continue
        return found

    def kill(self) -> None:
        """SIGKILL to whatever is left of it."""
        for pid in self.family():
            os.kill(pid, 9)
        self.popen.kill()
        self.popen.communicate(timeout=TIMEOUT)
