"""What needs a person: dead letters listed, shown, redriven, discarded.

A redrive takes these steps, and a crash between any two of them loses nothing and runs nothing twice:

1. ``redrive`` in Redis, at once: a new generation, starts 0, `queued`, the task in the record, and the letter's fence
   noted as answered for as long as letters are kept. Before it nothing has happened, and the redrive can be asked for
   again. From here on the record is the promise: whoever dies, the reconciler finds a queued job that is not in the
   stream and publishes it. Of two redrives at once one makes this step; the other is told that it was made.
2. The job's subject is purged. What stood there is of an older generation, which a claim would answer with 'over'.
3. The task is published under the new generation's message id. Where the reconciler was faster, the purge took its
   message away or the stream refuses the second one; the claim lets one attempt run in any case.
4. The letters that were read before step 1 are removed, each by its place: a letter that the new generation has left
   in the meantime stays. Where this step is missing, the letter stands although it was answered. The fence noted in
   step 1 outlives the record, so a second redrive of it runs nothing: it is refused, and makes up for this step.

The record may be gone, since letters are kept longer: then the letter's task makes it again, with the generation after
the letter's and the letter's fence to go on from. So neither a duplicate message id, nor an ack, nor a write of an
attempt of the job's earlier life can touch it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

import structlog

from toolfleet.services.background_jobs.dead_letter_values import (
    Letter,
    LetterFilter,
    LetterHistory,
    LetterPage,
    ManyDone,
    Refusal,
)
from toolfleet.services.background_jobs.errors import DeadLetterNotFound, IllegalMove, QueueError, StoreError
from toolfleet.services.background_jobs.ports import JobStore, ReopenAnswer
from toolfleet.services.background_jobs.queue_ports import DeadLetter, DeadLetterBox, JobQueue
from toolfleet.services.background_jobs.reopening import not_allowed, publish_generation
from toolfleet.services.background_jobs.task_models import (
    DEFAULT_TENANT,
    is_job_id,
)

log = structlog.get_logger(__name__)

SCAN_MAX: Final = 5000
"""Letters that one question reads at most; its answer says where the next one is to begin."""
LETTER_PREFIX: Final = "letter_"
MAX_DIGITS: Final = 18
"""Of a place in the stream: beyond it lies what a 64-bit number can't hold."""
AT_ONCE: Final = 8
"""Redrives of one request that run side by side."""
HISTORY_MAX: Final = 1000
"""Events of a job that are shown, the latest ones; the log itself keeps `event_log_max` writes."""


class DeadLetters:
    """Dead letters for every transport. Letters of other tenants are not there; malformed ones are the default's.

    Every method raises `QueueUnavailable` where the stream does not answer, and `StoreUnavailable` where Redis is
    asked and does not.
    """

    def __init__(self, store: JobStore, queue: JobQueue, box: DeadLetterBox, *, keep_s: float) -> None:
        """`keep_s` is how long the stream keeps a letter."""
        self._store = store
        self._queue = queue
        self.box = box
        self._keep_ms = int(keep_s * 1000)

    async def page(self, wanted: LetterFilter, after: int, limit: int, tenant: str = DEFAULT_TENANT) -> LetterPage:
        """The letters that are meant, behind a place in the stream; fewer than asked where `SCAN_MAX` were read."""
        found: list[Letter] = []
        read = 0
        while read < SCAN_MAX:
            page = await self.box.page(after, min(limit - len(found), SCAN_MAX - read))
            for entry in page.entries:
                letter = Letter(entry, entry.task())
                if letter.tenant == tenant and wanted.fits(entry, letter.task):
                    found.append(letter)
            if page.cursor is None:
                return LetterPage(found, None)
            read, after = read + len(page.entries), page.cursor
            if len(found) == limit:
                break
        return LetterPage(found, after)

    async def show(self, letter_id: str, tenant: str = DEFAULT_TENANT) -> LetterHistory:
        """All that is known of one: `letter_id` is a job's id, or ``letter_<seq>`` of a malformed message.

        Raises:
            DeadLetterNotFound: there is none.
        """
        letters = await self._letters(letter_id, tenant)
        if letters[-1].letter.malformed:
            return LetterHistory(letters, None, (), {})
        record = await self._store.get(letter_id)
        after = max(0, record.last_event - HISTORY_MAX) if record else 0
        events, results = await asyncio.gather(
            self._store.events(letter_id, after, HISTORY_MAX), self._store.results(letter_id)
        )
        return LetterHistory(letters, record, events, results)

    async def redrive(
        self, letter_id: str, *, tenant: str = DEFAULT_TENANT, by: str = "", note: str = ""
    ) -> ReopenAnswer:
        """Run the job of a dead letter again, under its id, with its log and stored results; see above.

        Args:
            letter_id: the job's id.
            tenant: whose it is.
            by: who asks, for the log.
            note: why, for the log.

        Raises:
            DeadLetterNotFound: there is none.
            IllegalMove: it is no job, was redriven already, or the job runs or ended otherwise in the meantime.
        """
        letters = await self._letters(letter_id, tenant)
        newest = letters[-1]
        if newest.task is None:
            raise _not_runnable(letter_id, newest.letter)
        fence = max(each.letter.fence for each in letters)
        answer = await self._store.redrive(newest.task, fence, self._keep_ms, note, by)
        if answer.verdict == "not_allowed":
            raise not_allowed(letter_id, answer.status)
        if answer.verdict == "reopened" and answer.task is not None:
            await publish_generation(self._queue, answer.task)
            log.info("dead_letter.redriven", job_id=letter_id, generation=answer.generation, by=by)
        await self._tidy_up(letter_id, letters)
        if answer.verdict == "answered":
            raise _answered(letter_id, answer)
        return answer

    async def redrive_many(
        self,
        wanted: LetterFilter,
        *,
        limit: int,
        after: int = 0,
        dry_run: bool = False,
        tenant: str = DEFAULT_TENANT,
        by: str = "",
        note: str = "",
    ) -> ManyDone:
        """Redrive the jobs of the letters that are meant, at most `limit` of them.

        Malformed messages can't be redriven: they are refused where the filter asks for their reason, and left out
        where it does not. What is not tried because a part is down stands among the refused.
        """
        meant, cursor = await self._jobs_meant(wanted, after, limit, tenant)
        if dry_run:
            return ManyDone(meant, (), (), cursor)
        done: list[str] = []
        refused: list[Refusal] = []
        down: list[str] = []
        slots = asyncio.Semaphore(AT_ONCE)

        async def one(letter_id: str) -> None:
            async with slots:
                if down:
                    refused.append(Refusal(letter_id, f"not tried: {down[0]}"))
                    return
                try:
                    await self.redrive(letter_id, tenant=tenant, by=by, note=note)
                except (IllegalMove, DeadLetterNotFound) as error:
                    refused.append(Refusal(letter_id, str(error)))
                except (QueueError, StoreError) as error:
                    down.append(str(error))
                    refused.append(Refusal(letter_id, str(error)))
                else:
                    done.append(letter_id)

        await asyncio.gather(*map(one, meant))
        return ManyDone(meant, done, refused, cursor)

    async def discard(self, letter_id: str, *, tenant: str = DEFAULT_TENANT, by: str = "", note: str = "") -> int:
        """Remove the letters of a job, or a malformed message, for good; how many. The job's record is left alone.

        Raises:
            DeadLetterNotFound: there is none.
        """
        removed = await self.box.remove([each.letter for each in await self._letters(letter_id, tenant)])
        if not removed:
            raise _not_found(letter_id)
        log.info("dead_letter.discarded", letter_id=letter_id, letters=removed, by=by, note=note)
        return removed

    async def discard_many(
        self,
        wanted: LetterFilter,
        *,
        limit: int,
        after: int = 0,
        dry_run: bool = False,
        tenant: str = DEFAULT_TENANT,
        by: str = "",
        note: str = "",
    ) -> ManyDone:
        """Remove exactly the letters that are meant, at most `limit` of them."""
        page = await self.page(wanted, after, limit, tenant)
        meant = [each.letter.letter_id for each in page.letters]
        if dry_run:
            return ManyDone(meant, (), (), page.cursor)
        done: list[str] = []
        refused: list[Refusal] = []
        for each in page.letters:
            letter_id = each.letter.letter_id
            if await self.box.remove([each.letter]):
                done.append(letter_id)
            else:
                refused.append(Refusal(letter_id, "somebody else has removed it in the meantime"))
        log.info("dead_letter.discarded_many", letters=len(done), by=by, note=note)
        return ManyDone(meant, done, refused, page.cursor)

    async def _jobs_meant(
        self, wanted: LetterFilter, after: int, limit: int, tenant: str
    ) -> tuple[list[str], int | None]:
        """Ids without repetition, and where to go on."""
        ids: dict[str, None] = {}
        while True:
            asked = limit - len(ids)
            page = await self.page(wanted, after, asked, tenant)
            ids |= {
                each.letter.letter_id: None
                for each in page.letters
                if wanted.reason is not None or not each.letter.malformed
            }
            if page.cursor is None or len(page.letters) < asked or len(ids) == limit:
                return list(ids), page.cursor
            after = page.cursor

    async def _letters(self, letter_id: str, tenant: str) -> list[Letter]:
        """Those of a job, oldest attempt first, or the malformed message; never none."""
        if is_job_id(letter_id):
            entries = [each for each in await self.box.of_job(letter_id) if not each.malformed]
            entries.sort(key=lambda each: each.fence)
        else:
            seq = letter_id.removeprefix(LETTER_PREFIX)
            if seq == letter_id or not (seq.isascii() and seq.isdigit() and len(seq) <= MAX_DIGITS):
                raise _not_found(letter_id)
            # Places count from 1; JetStream does not take 0 for one.
            entry = await self.box.at(int(seq)) if int(seq) else None
            if entry is not None and not entry.malformed:
                raise DeadLetterNotFound(f"{letter_id} is the letter of a job; ask for it by the job's id")
            entries = [entry] if entry is not None else []
        found = [Letter(entry, entry.task()) for entry in entries]
        if not any(each.tenant == tenant for each in found):
            raise _not_found(letter_id)
        return found

    async def _tidy_up(self, letter_id: str, letters: Sequence[Letter]) -> None:
        """Step 4; a queue that is down leaves it to the next redrive, which is refused, or to a discard."""
        try:
            await self.box.remove([each.letter for each in letters])
        except QueueError as error:
            log.warning("dead_letter.left", job_id=letter_id, error=str(error), hint="it was answered; discard it")


def _not_found(letter_id: str) -> DeadLetterNotFound:
    what = f"job {letter_id} has no dead letter" if is_job_id(letter_id) else "there is no such dead letter"
    return DeadLetterNotFound(f"{what}; it was redriven, discarded, or grew too old")


def _not_runnable(letter_id: str, letter: DeadLetter) -> IllegalMove:
    if letter.malformed:
        return IllegalMove(
            f"{letter_id} is no job, so there is nothing to run: {letter.message}. Look at what its sender published, "
            "submit the job with POST /api/v1/jobs, and discard this message"
        )
    return IllegalMove(
        f"the task of {letter_id} was written by a newer version of toolfleet; redrive it with that version"
    )


def _answered(letter_id: str, answer: ReopenAnswer) -> IllegalMove:
    since = f"its generation {answer.generation} is {answer.status}" if answer.status else "and its record has expired"
    return IllegalMove(
        f"job {letter_id} was opened again after this letter was written, {since}; nothing was run now, and the "
        "letter is removed. Where it has to run once more: POST …/retry for a failed one, or submit it as a new job",
        status=answer.status.value if answer.status else None,
    )
