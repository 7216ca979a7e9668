"""A folder of files that must survive the process that writes them.

Each process has one of its own below a common root and holds it with a lock, which the system drops when the process
ends, however it ends. Then whoever takes the lock owns what is in there. Everything here blocks.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import Final

LOCK: Final = "lock"
ASIDE: Final = "aside"
"""Beside the folders: what nobody could read, for a person."""


class SpoolFolder:
    """A folder that this process holds."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock = lock

    @classmethod
    def make(cls, root: Path) -> SpoolFolder:
        """A new one, held from the moment at which others can see it. Raises `OSError`."""
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=".new-", dir=root))
        lock = None
        try:
            lock = os.open(fresh / LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path = root / f"{os.getpid()}-{secrets.token_hex(4)}"
            fresh.rename(path)
            _sync(root)
        except OSError:
            # A full disk is met by every attempt that ends: each would leave a folder that nobody looks into.
            shutil.rmtree(fresh, ignore_errors=True)
            if lock is not None:
                os.close(lock)
            raise
        return cls(path, lock)

    @classmethod
    def adopt_all(cls, root: Path) -> list[SpoolFolder]:
        """The folders whose holders are gone, now held by us. Raises `OSError` where the root can't be read."""
        if not root.is_dir():
            return []
        names = sorted(path for path in root.iterdir() if path.name != ASIDE and not path.name.startswith("."))
        return [folder for path in names if (folder := cls._adopt(path)) is not None]

    @classmethod
    def _adopt(cls, path: Path) -> SpoolFolder | None:
        try:
            lock = os.open(path / LOCK, os.O_RDWR)
        except OSError:
            # Somebody has just emptied it, or it is none.
            return None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Its holder may have removed it between the two lines above.
            stands = os.path.samestat(os.fstat(lock), (path / LOCK).stat())
        except OSError:
            stands = False
        if not stands:
            os.close(lock)
            return None
        return cls(path, lock)

    def put(self, name: str, data: bytes) -> Path:
        """Write a file, whole and on the disk when this returns. Raises `OSError`, and then there is none."""
        path, fresh = self.path / name, self.path / f".{name}"
        try:
            # Results of tools may be nobody else's business.
            with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                fresh.unlink()
            raise
        _sync(self.path)
        return path

    def files(self) -> list[Path]:
        """The whole ones."""
        return sorted(path for path in self.path.iterdir() if path.name != LOCK and not path.name.startswith("."))

    def put_aside(self, path: Path) -> Path:
        """Move a file out of everybody's way. Raises `OSError`."""
        aside = self.path.parent / ASIDE
        aside.mkdir(mode=0o700, exist_ok=True)
        return path.replace(aside / f"{self.path.name}-{path.name}")

    def release(self) -> None:
        """Let go of it; where nothing is in there it goes too. What can't be removed waits for the next one."""
        with contextlib.suppress(OSError):
            if not self.files():
                for path in self.path.iterdir():
                    path.unlink()
                self.path.rmdir()
        os.close(self._lock)


def _sync(folder: Path) -> None:
    """A name is on the disk only when its folder is."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
