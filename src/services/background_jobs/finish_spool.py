"""Keeps the end of an attempt on the local disk while the store can't take it.

An attempt that is over while Redis is away waits, and its worker may die meanwhile. So what it has to write is put
into a file first, and goes from there when it has been written. Every process has a folder of its own below the spool;
a folder whose process is gone is adopted by whoever finds it, at its start and every few seconds. Nothing is touched
here while the store serves.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

import structlog

from toolfleet.services.background_jobs.errors import MalformedTask, StoreError, StoreUnavailable
from toolfleet.services.background_jobs.last_words import LastStore, LastWords
from toolfleet.services.background_jobs.ports import RetryAnswer
from toolfleet.services.background_jobs.spool_folder import SpoolFolder
from toolfleet.services.background_jobs.store_gate import StoreGate

log = structlog.get_logger(__name__)

LOOK_S: Final = 5.0
"""Between two looks for folders of processes that are gone: well before the ack_wait after which a job of theirs would
be run again."""
FIRST_LOOK_S: Final = 2.0
"""For the look before a worker takes jobs; what the store does not take in this time is written beside them."""

T = TypeVar("T")


class FinishSpool:
    """The last words of this process's attempts, and of those that nobody else will write any more."""

    def __init__(self, root: Path, store: LastStore, gate: StoreGate) -> None:
        """`root` is the host's spool, shared by the processes of one fleet. It is made when it is needed."""
        self._root = root
        self._store = store
        self._gate = gate
        self._own: SpoolFolder | None = None
        # One thread of its own: the loop's common ones may all hang in name resolution, for the very same outage.
        self._thread = ThreadPoolExecutor(1, "spool")

    async def insist(self, words: LastWords) -> RetryAnswer:
        """Write, and repeat it until the store has answered; meanwhile it stands in the spool.

        Raises:
            StoreError: the store refused it; trying again would not help.
        """
        file: Path | None = None
        tried = False
        try:
            while True:
                try:
                    answer = await words.write(self._store)
                    break
                except StoreUnavailable as error:
                    self._gate.shut(error)
                if not tried:
                    tried, file = True, await self._keep(words)
                await self._gate.wait()
        except StoreError:
            if file is not None:
                await self._put_aside(self._own, file, words.lease.job_id)
            raise
        if file is not None:
            await self._remove(file)
        return answer

    async def _keep(self, words: LastWords) -> Path | None:
        lease = words.lease
        try:
            data = words.to_json()
            file = await self._on_disk(lambda: self._put(f"{lease.job_id}.{lease.fence}.json", data))
        except (OSError, ValueError) as error:
            log.error(
                "spool.not_written",
                job_id=lease.job_id,
                error=str(error),
                hint=f"it waits in memory and would be lost with this process: make {self._root} writable",
            )
            return None
        log.info("spool.kept", job_id=lease.job_id, fence=lease.fence, kind=words.last.kind)
        return file

    def _put(self, name: str, data: bytes) -> Path:
        if self._own is not None:
            with contextlib.suppress(FileNotFoundError):
                return self._own.put(name, data)
            # Somebody has cleaned up. Let go of once: by the next time the number of its lock may be a socket's.
            gone, self._own = self._own, None
            gone.release()
        self._own = SpoolFolder.make(self._root)
        return self._own.put(name, data)

    async def _on_disk(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def _remove(self, file: Path) -> None:
        try:
            await self._on_disk(file.unlink)
        except OSError as error:
            # Written a second time, it is answered as the first time or refused.
            log.warning("spool.not_removed", path=str(file), error=str(error))

    # -- what others have left ---------------------------------------------------------------------------------

    async def run(self) -> None:
        """Look for folders of processes that are gone, until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(LOOK_S)

    async def look_first(self) -> None:
        """Write what others have left before new jobs are taken, as far as the store takes it at once."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_LOOK_S):
                await self.look()

    async def look(self) -> None:
        """Adopt the folders whose processes are gone, and write what is in them, however long the store takes."""
        adopting = asyncio.ensure_future(self._on_disk(lambda: SpoolFolder.adopt_all(self._root)))
        try:
            folders = await asyncio.shield(adopting)
        except asyncio.CancelledError:
            # The thread goes on, and what it takes would be nobody's for as long as this process lives.
            adopting.add_done_callback(_release_all)
            raise
        except OSError as error:
            log.warning("spool.not_readable", path=str(self._root), error=str(error))
            return
        with contextlib.ExitStack() as stack:
            for folder in folders:
                stack.callback(folder.release)
            for folder in folders:
                await self._write_out(folder)

    async def _write_out(self, folder: SpoolFolder) -> None:
        try:
            files = await self._on_disk(folder.files)
        except OSError as error:
            log.warning("spool.not_readable", path=str(folder.path), error=str(error))
            return
        for file in files:
            try:
                words = LastWords.from_json(await self._on_disk(file.read_bytes))
                answer = await self._gate.insist(lambda words=words: words.write(self._store))  # type: ignore[misc]
            except (OSError, MalformedTask, StoreError) as error:
                log.error("spool.unusable", path=str(file), error=str(error))
                await self._put_aside(folder, file, file.name.partition(".")[0])
                continue
            named = {"job_id": words.lease.job_id, "fence": words.lease.fence, "kind": words.last.kind}
            if answer == "lost":
                log.warning("spool.refused", **named, hint="somebody else has had the job since; this is dropped")
            else:
                log.info("spool.written", **named, answer=answer)
            await self._remove(file)

    async def _put_aside(self, folder: SpoolFolder | None, file: Path, job_id: str) -> None:
        if folder is None:
            return
        try:
            path = await self._on_disk(lambda: folder.put_aside(file))
        except OSError as error:
            log.warning("spool.not_put_aside", path=str(file), error=str(error))
        else:
            log.warning("spool.put_aside", job_id=job_id, path=str(path), hint="look at it, then delete it")

    async def close(self) -> None:
        """Let go of the own folder, after what is being written; what stands in it is for whoever adopts it."""
        await self._on_disk(lambda: self._own.release() if self._own is not None else None)
        self._thread.shutdown(wait=False)


def _release_all(adopted: asyncio.Future[list[SpoolFolder]]) -> None:
    if not adopted.cancelled() and adopted.exception() is None:
        for folder in adopted.result():
            folder.release()
