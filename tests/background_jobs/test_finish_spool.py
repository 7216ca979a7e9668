"""What could not be written while Redis was away: kept on the disk, written later, whoever is alive then."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.background_jobs.harness import job, open_fleet, running_worker
from tests.background_jobs.making import ERROR, make_task, result
from tests.background_jobs.test_processes import SHORT, exit_code
from tests.background_jobs.test_processes import Fleet as Processes
from tests.background_jobs.worker_main import Ledger, tools
from tests.support.waiting import wait_until
from toolfleet.bootstrap import open_core, open_service
from toolfleet.services.background_jobs import finish_spool, transitions
from toolfleet.services.background_jobs.errors import MalformedTask, StoreSilent
from toolfleet.services.background_jobs.finish_spool import FinishSpool
from toolfleet.services.background_jobs.last_words import (
    FinishWrite,
    HandBackWrite,
    LastWords,
    LastWrite,
    ProgressWrite,
    RetryWrite,
)
from toolfleet.services.background_jobs.ports import Changes, Granted, Lease
from toolfleet.services.background_jobs.redis_state_manager import RedisStateManager
from toolfleet.services.background_jobs.spool_folder import ASIDE, LOCK, SpoolFolder
from toolfleet.services.background_jobs.task_models import EventType, NewEvent, Status, TaskDefinition
from toolfleet.services.embedded.nats_server import EmbeddedNats
from toolfleet.services.embedded.valkey_server import EmbeddedValkey
from toolfleet.settings import Settings

TOLD = NewEvent(EventType.TOOL_COMPLETED, {"tool_call_id": "c1", "tool_name": "echo", "duration_ms": 1})
CHANGES = Changes(results=(result("c1"),), events=(TOLD,), percent=50.0, message="half")


def files(root: Path) -> list[Path]:
    """The entries of all folders of a spool; not those that are being written, which have a dot before their names."""
    found = (path for path in root.glob("*/*") if path.name != LOCK and path.parent.name != ASIDE)
    return sorted(path for path in found if not path.name.startswith("."))


def folders(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if path.name != ASIDE]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "run" / "spool"


@contextlib.asynccontextmanager
async def spooling(root: Path, store: RedisStateManager) -> AsyncIterator[FinishSpool]:
    spool = FinishSpool(root, store, store.gate)
    try:
        yield spool
    finally:
        await spool.close()


async def claimed(store: RedisStateManager, task: TaskDefinition, *, lease_ms: int = 60_000, token: str = "t") -> Lease:
    answer = await store.claim(task, token=token, worker="w", lease_ms=lease_ms, published_at=None)
    assert isinstance(answer, Granted)
    return Lease(task.job_id, answer.fence)


def finished(lease: Lease, **fields: object) -> LastWords:
    return LastWords(lease, FinishWrite(transitions.completed(1), CHANGES), **fields)  # type: ignore[arg-type]


def left_behind(root: Path, *words: LastWords) -> SpoolFolder:
    """The folder of a process that has died."""
    folder = SpoolFolder.make(root)
    for each in words:
        folder.put(f"{each.lease.job_id}.{each.lease.fence}.json", each.to_json())
    os.close(folder._lock)
    return folder


# -- the words ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "last",
    [
        FinishWrite(transitions.failed(ERROR), CHANGES),
        FinishWrite(transitions.unknown("job_x", ["c1", "c2"]), Changes()),
        RetryWrite(250, ERROR, CHANGES),
        HandBackWrite(CHANGES),
        ProgressWrite(7, CHANGES),
    ],
    ids=lambda last: f"{last.kind}",
)
def test_last_words_are_read_as_they_were_written(last: LastWrite) -> None:
    words = LastWords(Lease("job_x", 3), last, ProgressWrite(2, CHANGES), ("c2",))
    assert LastWords.from_json(words.to_json()) == words


@pytest.mark.parametrize("text", [b"", b"no json", b"{}", b'{"v": 2, "words": {}}', b'{"v": 1, "words": {"last": {}}}'])
def test_what_is_no_last_word_is_said_to_be_none(text: bytes) -> None:
    with pytest.raises(MalformedTask, match="not the last words of an attempt"):
        LastWords.from_json(text)


@pytest.mark.leaves_open_jobs
async def test_words_that_are_written_twice_are_told_once(store: RedisStateManager) -> None:
    for last in (FinishWrite(transitions.completed(2), Changes(events=(TOLD,))), RetryWrite(1000, ERROR, Changes())):
        lease = await claimed(store, task := make_task())
        words = LastWords(lease, last, unanswered=ProgressWrite(1, CHANGES))
        first = await words.write(store)
        events = await store.events(task.job_id)
        assert await words.write(store) == first
        assert await store.events(task.job_id) == events


# -- the folders -------------------------------------------------------------------------------------------------------


def test_a_folder_is_its_holders_until_the_holder_is_gone(root: Path) -> None:
    folder = SpoolFolder.make(root)
    folder.put("a", b"1")
    assert SpoolFolder.adopt_all(root) == []
    folder.release()
    (adopted,) = SpoolFolder.adopt_all(root)
    assert [path.read_bytes() for path in adopted.files()] == [b"1"]
    assert SpoolFolder.adopt_all(root) == []
    adopted.files()[0].unlink()
    adopted.release()
    assert folders(root) == []


def test_of_a_file_that_can_not_be_written_nothing_is_left(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = SpoolFolder.make(root)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            folder.put("a", b"1")
    assert (folder.files(), [path.name for path in folder.path.iterdir()]) == ([], [LOCK])
    folder.release()
    assert folders(root) == []


def test_a_folder_that_could_not_be_made_leaves_nothing_behind(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for step in ((fcntl, "flock"), (os, "fsync")):
        with monkeypatch.context() as patched:
            patched.setattr(*step, full)
            with pytest.raises(OSError, match="No space"):
                SpoolFolder.make(root)
        # What was named already is taken away by whoever looks for folders of the dead.
        for folder in SpoolFolder.adopt_all(root):
            folder.release()
        assert list(root.iterdir()) == []


def test_a_folder_that_its_holder_removes_at_this_moment_is_not_adopted(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = SpoolFolder.make(root)
    flock = fcntl.flock

    def late(lock: int, how: int) -> None:
        folder.release()
        flock(lock, how)

    monkeypatch.setattr(fcntl, "flock", late)
    assert SpoolFolder.adopt_all(root) == []


async def test_a_folder_that_somebody_removed_is_let_go_of_once(
    store: RedisStateManager, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with spooling(root, store) as spool:
        spool._put("a", b"1")
        shutil.rmtree(root)

        def full(_: Path) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(SpoolFolder, "make", full)
            with pytest.raises(OSError, match="No space"):
                spool._put("b", b"2")
            # The number of the lock may be a socket's by now.
            patched.setattr(os, "close", lambda number: pytest.fail(f"{number} is closed a second time"))
            with pytest.raises(OSError, match="No space"):
                spool._put("c", b"3")
        assert spool._put("d", b"4").read_bytes() == b"4"


# -- waiting for the store ---------------------------------------------------------------------------------------------


async def test_while_the_store_serves_the_disk_is_not_touched(settings: Settings, root: Path) -> None:
    async with open_fleet(settings) as fleet:
        assert (await fleet.over(await fleet.submit("echo", "once_echo"))).status is Status.COMPLETED
    assert not root.exists()


async def test_a_finish_stands_on_the_disk_until_it_is_written(
    own_settings: Settings, own_valkey: EmbeddedValkey, root: Path
) -> None:
    async with open_fleet(own_settings) as fleet:
        ids = [await fleet.submit("hold", ("fail", {"how": "rejected"})) for _ in range(3)]
        await wait_until(lambda: fleet.bench.at_once == 3, "all run")
        await own_valkey.pause()
        fleet.bench.gate.set()
        await wait_until(lambda: len(files(root)) == 3, "each finish is on the disk")
        assert [path.stat().st_mode & 0o077 for path in files(root)] == [0, 0, 0]
        await own_valkey.resume()
        for job_id in ids:
            record = await fleet.over(job_id)
            assert (record.status, record.starts, record.completed_calls) == (Status.FAILED, 1, 1)
            kinds = await fleet.kinds(job_id)
            assert (kinds.count("tool.completed"), kinds.count("tool.failed"), kinds[-1]) == (1, 1, "job.failed")
        await fleet.queue_is_empty()
        await wait_until(lambda: not files(root), "nothing is left on the disk")
    assert folders(root) == []


async def test_a_disk_that_takes_nothing_leaves_the_finish_in_memory(
    own_settings: Settings, own_valkey: EmbeddedValkey, root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # A file in the place of the folder: even root can't write below it.
    root.parent.mkdir()
    root.touch()
    async with open_fleet(own_settings) as fleet:
        job_id = await fleet.submit("hold")
        await fleet.began("c1:1")
        await own_valkey.pause()
        fleet.bench.gate.set()
        said = ""

        def complains() -> bool:
            nonlocal said
            said += capfd.readouterr().out
            return "spool.not_written" in said

        await wait_until(complains, "the disk's refusal is logged")
        await own_valkey.resume()
        assert (await fleet.over(job_id)).starts == 1
        await fleet.queue_is_empty()


@pytest.mark.promise("G4")
async def test_results_of_an_attempt_that_lost_its_lease_in_an_outage_are_kept(
    own_settings: Settings, own_valkey: EmbeddedValkey, root: Path
) -> None:
    settings = own_settings.model_copy(update={"lease": 0.6, "calls_at_once": 1})
    async with open_fleet(settings) as fleet:
        job_id = await fleet.submit("hold", "hold")
        await fleet.began("c1:1")
        await own_valkey.pause()
        # Lets go of the call that waits, not of the next one.
        fleet.bench.gate.set()
        fleet.bench.gate.clear()
        await fleet.began("c2:1")
        await wait_until(lambda: fleet.bench.stopped == ["c2"], "the lease has run out")
        await wait_until(lambda: files(root), "the result is on the disk")
        await own_valkey.resume()
        await fleet.began("c2:2")
        fleet.bench.gate.set()
        record = await fleet.over(job_id)
        assert (record.status, record.completed_calls, record.fence) == (Status.COMPLETED, 2, 2)
        assert fleet.bench.started == ["c1:1", "c2:1", "c2:2"]
        assert (await fleet.kinds(job_id)).count("tool.completed") == 2
        await fleet.queue_is_empty()
        await wait_until(lambda: not files(root), "nothing is left on the disk")


async def test_a_call_that_was_not_sent_may_run_although_its_attempt_was_stopped_while_it_said_so(
    own_settings: Settings, own_valkey: EmbeddedValkey, root: Path
) -> None:
    async with open_fleet(own_settings, workers=0) as fleet:
        fleet.bench.session.clear()
        async with running_worker(own_settings, fleet.bench) as worker:
            job_id = await fleet.submit(("once_fail", {"how": "unsent", "times": 1}))
            await wait_until(lambda: fleet.bench.waiting == 1, "its start is marked")
            # Not paused: what it was sent it would still do.
            await own_valkey.kill()
            fleet.bench.session.set()
            await fleet.began("c1:1")
            worker.stop()
            await wait_until(lambda: files(root), "what is left to say is on the disk")
            await own_valkey.start()
            handed_back = await fleet.reaches(job_id, Status.QUEUED)
            assert handed_back.retries == 0
        async with running_worker(own_settings, fleet.bench):
            record = await fleet.over(job_id)
        assert (record.status, record.generation) == (Status.COMPLETED, 1)
        assert fleet.bench.started == ["c1:1", "c1:2"]


async def test_a_synchronous_run_is_kept_as_well(
    own_settings: Settings, own_valkey: EmbeddedValkey, root: Path
) -> None:
    async with open_fleet(own_settings, workers=0, runs_jobs=True) as fleet:
        run = asyncio.create_task(fleet.service.submit(job("hold", mode="sync")))
        await fleet.began("c1:1")
        await own_valkey.pause()
        fleet.bench.gate.set()
        await wait_until(lambda: files(root), "the finish is on the disk")
        await own_valkey.resume()
        submission = await run
        assert submission.record is not None
        assert submission.record.status is Status.COMPLETED


# -- what the dead have left -------------------------------------------------------------------------------------------


async def test_what_a_dead_process_left_is_written_and_its_folder_goes(store: RedisStateManager, root: Path) -> None:
    task = make_task()
    left_behind(root, finished(await claimed(store, task)))
    async with spooling(root, store) as spool:
        await spool.look()
    record = await store.get(task.job_id)
    assert record is not None
    assert (record.status, list(await store.results(task.job_id))) == (Status.COMPLETED, ["c1"])
    assert folders(root) == []


@pytest.mark.promise("G2")
@pytest.mark.leaves_open_jobs
async def test_the_spool_of_an_old_fence_changes_nothing(store: RedisStateManager, root: Path) -> None:
    task = make_task()
    old = await claimed(store, task, lease_ms=1)

    async def taken() -> bool:
        answer = await store.claim(task, token="other", worker="w2", lease_ms=60_000, published_at=None)
        return isinstance(answer, Granted)

    await wait_until(taken, "another attempt has the job")
    before = await store.get(task.job_id), await store.events(task.job_id)
    left_behind(root, finished(old), LastWords(Lease(task.job_id, 99), HandBackWrite(CHANGES)))
    async with spooling(root, store) as spool:
        await spool.look()
    assert (await store.get(task.job_id), await store.events(task.job_id)) == before
    assert not await store.results(task.job_id)
    assert folders(root) == []


@pytest.mark.promise("G5")
@pytest.mark.parametrize("unanswered", [False, True])
async def test_the_finish_of_a_dead_worker_settles_a_job_that_became_unknown(
    store: RedisStateManager, root: Path, unanswered: bool
) -> None:
    task = make_task(tool="once_echo")
    lease = await claimed(store, task)
    await store.mark_start(lease, task.tools[0], 1)

    async def given_up() -> bool:
        answer = await store.claim(task, token="other", worker="w2", lease_ms=60_000, published_at=None)
        assert not isinstance(answer, Granted)
        record = await store.get(task.job_id)
        return record is not None and record.status is Status.UNKNOWN

    await wait_until(given_up, "nobody knows what became of the call")
    last = FinishWrite(transitions.completed(1), Changes() if unanswered else CHANGES)
    left_behind(root, LastWords(lease, last, ProgressWrite(1, CHANGES) if unanswered else None))
    async with spooling(root, store) as spool:
        await spool.look()
    record = await store.get(task.job_id)
    assert record is not None
    assert (record.status, record.generation, record.undecided) == (Status.COMPLETED, 2, ())
    assert list(await store.results(task.job_id)) == ["c1"]


async def test_a_file_that_nobody_can_read_is_put_aside_and_the_others_are_written(
    store: RedisStateManager, root: Path
) -> None:
    task = make_task()
    words = finished(await claimed(store, task))
    newer = json.loads(words.to_json()) | {"v": 99}
    folder = left_behind(root, words)
    (folder.path / "0.json").write_bytes(words.to_json()[:-20])
    (folder.path / "1.json").write_text(json.dumps(newer))
    (folder.path / ".half.json").write_bytes(b"never finished")
    async with spooling(root, store) as spool:
        await spool.look()
    record = await store.get(task.job_id)
    assert record is not None
    assert record.status is Status.COMPLETED
    assert sorted(path.name for path in (root / ASIDE).iterdir()) == [
        f"{folder.path.name}-0.json",
        f"{folder.path.name}-1.json",
    ]
    assert folders(root) == []


async def test_a_running_process_takes_over_and_waits_for_the_store(
    own_settings: Settings, own_valkey: EmbeddedValkey, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finish_spool, "LOOK_S", 0.02)
    async with open_core(own_settings, name="test") as core, spooling(root, core.store) as spool:
        task = make_task()
        words = finished(await claimed(core.store, task))
        looking = asyncio.create_task(spool.run())
        await own_valkey.pause()
        with pytest.raises(StoreSilent):
            await core.store.get(task.job_id)
        folder = left_behind(root, words)
        await wait_until(lambda: folder.path not in _free(root), "somebody holds the folder")
        await own_valkey.resume()
        await wait_until(lambda: not folders(root), "it is written and gone")
        record = await core.store.get(task.job_id)
        assert record is not None
        assert record.status is Status.COMPLETED
        looking.cancel()
        await asyncio.gather(looking, return_exceptions=True)


def _free(root: Path) -> list[Path]:
    """Folders that nobody holds at this moment."""
    adopted = SpoolFolder.adopt_all(root)
    for folder in adopted:
        os.close(folder._lock)
    return [folder.path for folder in adopted]


# -- real processes ----------------------------------------------------------------------------------------------------


@pytest.fixture
async def processes(own_settings: Settings, tmp_path: Path) -> AsyncIterator[Processes]:
    # Leases that outlast the outage: it is the spool that is to end the job, and nobody else.
    settings = own_settings.model_copy(update=SHORT | {"lease": 600.0})
    async with open_service(settings, tools=tools(Ledger(tmp_path / "unused"))) as wired:
        fleet = Processes(settings, wired.service, wired.core.queue, tmp_path)
        try:
            yield fleet
        finally:
            fleet.gate.touch()
            for process in fleet.processes:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()


@pytest.mark.promise("G1")
@pytest.mark.promise("G5")
async def test_a_worker_that_dies_in_an_outage_is_spoken_for_by_the_next_one(
    processes: Processes, own_valkey: EmbeddedValkey, own_nats: EmbeddedNats, root: Path
) -> None:
    here = {"state_dir": str(root.parent), "redis_timeout": 0.5}
    first = await processes.start(**here)
    job_id = await processes.submit("hold", "once_hold")
    await processes.noted("begin c1 1")
    await processes.noted("begin c2 1")
    await own_valkey.kill()
    processes.gate.touch()
    await wait_until(lambda: files(root), "the finish is on the disk")
    first.kill()
    await exit_code(first)
    await own_valkey.start()

    async def served() -> bool:
        with contextlib.suppress(StoreSilent):
            await processes.service.workers()
            return True
        return False

    await wait_until(served, "Redis is back")
    await processes.start(**here)
    record = await processes.over(job_id)
    assert (record.status, record.starts, record.fence, record.completed_calls) == (Status.COMPLETED, 1, 1, 2)
    assert sorted(processes.ledger()) == ["begin c1 1", "begin c2 1", "end c1 1", "end c2 1"]
    assert folders(root) == []
