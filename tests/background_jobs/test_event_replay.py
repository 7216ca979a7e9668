"""Events are told once and in order, whatever is dropped, repeated or trimmed on the way (G7)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from toolfleet.services.background_jobs.event_reader import Replay
from toolfleet.services.background_jobs.task_models import EventType, Gap, JobEvent

LENGTH = 30


def event(number: int) -> JobEvent:
    return JobEvent(
        id=number, type=EventType.TOOL_PROGRESS, job_id="job_1", generation=1, attempt=1, at=number, data={}
    )


def events(first: int, last: int) -> list[JobEvent]:
    return [event(number) for number in range(first, last + 1)]


class Reader:
    """A client and its connection: what it is told, and its place in the log."""

    def __init__(self, after: int) -> None:
        self.told: list[JobEvent | Gap] = []
        self.replay = Replay(after)

    def pushed(self, batch: list[JobEvent], log: list[JobEvent]) -> None:
        # As `read_events` does it: pushes that do not follow on what was told make it read the log.
        self.take(batch if self.replay.fits(batch) else log)

    def take(self, batch: list[JobEvent]) -> None:
        self.told += self.replay.take(batch)

    def reconnect(self) -> None:
        self.replay = Replay(self.replay.last)


steps = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(1, 4)),
        st.tuples(st.just("push"), st.integers(1, LENGTH), st.integers(1, 6)),
        st.tuples(st.just("read"), st.integers(1, 10)),
        st.tuples(st.just("reconnect")),
        st.tuples(st.just("trim"), st.integers(1, 5)),
    ),
    max_size=40,
)


@pytest.mark.promise("G7")
@given(steps, st.integers(0, 5))
def test_any_interleaving_tells_every_event_once_and_in_order(script: list[tuple[object, ...]], after: int) -> None:
    first, last = 1, after
    reader = Reader(after)
    for step in script:
        match step:
            case ("append", int(count)):
                last = min(LENGTH, last + count)
            case ("push", int(start), int(count)):
                # Any run of what was published: dropped ones are missing, repeated ones come again.
                start = min(start, last)
                reader.pushed(events(max(first, start), min(last, start + count)), events(max(first, 1), last))
            case ("read", int(limit)):
                reader.take([e for e in events(first, last) if e.id > reader.replay.last][:limit])
            case ("reconnect",):
                reader.reconnect()
            case ("trim", int(count)):
                first = min(last, first + count) or 1
    reader.take([e for e in events(first, last) if e.id > reader.replay.last])

    place = after
    for item in reader.told:
        if isinstance(item, Gap):
            assert item.after == place
            assert item.resumes_at > place + 1
            place = item.resumes_at - 1
        else:
            assert item.id == place + 1
            place = item.id
    assert place == last


def test_what_was_trimmed_is_told_as_a_gap() -> None:
    reader = Reader(after=2)
    reader.take(events(7, 9))
    assert reader.told == [Gap(after=2, resumes_at=7), *events(7, 9)]


def test_pushes_that_follow_on_spare_a_read_of_the_log() -> None:
    replay = Replay(3)
    assert replay.fits(events(4, 6))
    assert replay.fits(events(2, 5))
    assert not replay.fits(events(5, 6))
