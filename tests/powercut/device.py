"""An ext4 file system in a file, whose power can be cut."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Final

EXT4_IOC_SHUTDOWN: Final = (2 << 30) | (struct.calcsize("I") << 16) | (ord("X") << 8) | 125
"""``_IOR('X', 125, __u32)``, from fs/ext4/ext4.h of Linux."""
NO_LOG_FLUSH: Final = 2
"""``EXT4_GOING_FLAGS_NOLOGFLUSH``: from now on nothing reaches the disk, and the journal is not flushed first."""
PROGRAMS: Final = ("mkfs.ext4", "fsck.ext4", "mount", "umount", "sync", "unshare")
LOOP_CONTROL: Final = Path("/dev/loop-control")

_FSCK_REPAIRED: Final = 1


class DeviceFailed(Exception):
    """A program that makes, checks or mounts the file system failed; the message has its words."""


def what_is_missing(uid: int, *, loop_control: Path = LOOP_CONTROL) -> list[str]:
    """What this machine lacks for a power cut; empty where nothing does."""
    missing = [] if uid == 0 else [f"root (this is user {uid}): it mounts a file system and shuts it down"]
    if not loop_control.exists():
        missing.append(f"loop devices ({loop_control}): load the kernel's module `loop`")
    return missing + [f"the program {name}" for name in PROGRAMS if shutil.which(name) is None]


class Device:
    """One file system, mounted at `mount_point` from `mount` to `unmount`.

    The loop device belongs to the mount and goes with it, and the mount goes with the mount namespace: a driver that
    runs in one of its own (`__main__`) leaves neither behind, however it ends.
    """

    def __init__(self, folder: Path, megabytes: int = 1024) -> None:
        """The image, sparse, and the mount point lie in `folder`."""
        self._image = folder / "device.img"
        self._megabytes = megabytes
        self.mount_point = folder / "device"

    def make(self) -> None:
        """A new, empty file system. Raises `DeviceFailed`."""
        self.mount_point.mkdir()
        with self._image.open("wb") as image:
            image.truncate(self._megabytes << 20)
        # What mkfs leaves for later would be written in the background, between what is measured.
        _run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", str(self._image))

    def mount(self) -> None:
        """Raises `DeviceFailed`."""
        _run("mount", "-t", "ext4", "-o", "loop", str(self._image), str(self.mount_point))

    def settle(self) -> None:
        """Everything that was written so far is on the disk, as on a machine that has run for a while."""
        _run("sync", "--file-system", str(self.mount_point))

    def cut(self) -> None:
        """The power is gone: what is not on the disk by now never will be, and every further write fails."""
        folder = os.open(self.mount_point, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(folder, EXT4_IOC_SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
        finally:
            os.close(folder)

    def unmount(self) -> None:
        """Whoever had files open must be gone. Raises `DeviceFailed`."""
        _run("umount", str(self.mount_point))

    def check(self) -> None:
        """What a machine does before it mounts again: replays the journal. Raises `DeviceFailed` for real damage."""
        _run("fsck.ext4", "-p", str(self._image), fine=(0, _FSCK_REPAIRED))


def _run(program: str, *arguments: str, fine: tuple[int, ...] = (0,)) -> None:
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    if done.returncode not in fine:
        raise DeviceFailed(f"{program} {' '.join(arguments)} ended with {done.returncode}: {done.stderr.strip()}")
