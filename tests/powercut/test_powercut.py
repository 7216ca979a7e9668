"""The parts of the power cut that need neither root nor a disk: what it counts, when it fails, what it asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.powercut.audit import LOST, Figures, Found, audit, verdict
from tests.powercut.device import PROGRAMS, what_is_missing
from tests.powercut.ledger import Ledger, read_ledgers
from tests.powercut.plan import Plan
from tests.powercut.servers import make_servers, replaced

CUT = 10


def notes(*lines: tuple[int, str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"at": at, "what": what, "job": "j", **more} for at, what, more in lines]


WELL = notes(
    (1, "accepted", {}),
    (2, "effect", {"call": "c1", "once": True}),
    (3, "result", {"call": "c1", "text": "t"}),
    (4, "seen", {"status": "completed", "by": "worker"}),
)
KEPT = {"j": Found("completed", {"c1": "t"})}


def test_nothing_is_counted_where_everything_was_kept() -> None:
    figures = audit(WELL, KEPT, cut_at=CUT)
    assert (figures.accepted, figures.results, figures.seen_over, figures.open_at_cut) == (1, 1, 1, 0)
    assert [getattr(figures, name) for name in LOST] == [0] * len(LOST)
    assert figures.ended == {"completed": 1}


@pytest.mark.parametrize(
    ("more", "found", "counted"),
    [
        ([], {}, {"jobs_lost", "results_lost", "terminal_changed"}),
        ([], {"j": Found("queued", {"c1": "t"})}, {"jobs_lost", "terminal_changed"}),
        ([], {"j": Found("completed", {"c1": "another"})}, {"results_lost"}),
        ([], {"j": Found("failed", {"c1": "t"})}, {"terminal_changed"}),
        (notes((11, "effect", {"call": "c1", "once": False})), KEPT, {"rerun_after_result"}),
        (notes((5, "effect", {"call": "c1", "once": True})), KEPT, {"duplicate_effects"}),
    ],
)
def test_each_loss_is_counted(more: list[dict[str, Any]], found: dict[str, Found], counted: set[str]) -> None:
    figures = audit(WELL + more, found, cut_at=CUT)
    assert {name for name in LOST if getattr(figures, name)} == counted


def test_what_only_a_dead_process_has_heard_is_no_acknowledgement() -> None:
    late = [{**note, "at": CUT + 1} for note in WELL if note["what"] in ("result", "seen")]
    figures = audit([*WELL[:2], *late], {"j": Found("unknown")}, cut_at=CUT)
    assert (figures.results, figures.seen_over, figures.open_at_cut) == (0, 0, 1)
    assert [getattr(figures, name) for name in LOST] == [0] * len(LOST)


def figures(**changes: int) -> Figures:
    counts = dict.fromkeys(("accepted", "results", "seen_over", "open_at_cut"), 5) | dict.fromkeys(LOST, 0)
    return Figures(**(counts | changes), ended={})


def test_a_loss_fails_our_settings_and_none_fails_the_control() -> None:
    assert verdict("shipped", figures(), 5) == []
    for name in LOST:
        assert name in verdict("shipped", figures(**{name: 1}), 5)[0]
    assert verdict("default", figures(jobs_lost=1), 5) == []
    assert "prove nothing" in verdict("default", figures(), 5)[0]


@pytest.mark.parametrize("short", ["accepted", "results", "open_at_cut"])
def test_a_run_without_load_proves_nothing(short: str) -> None:
    assert len(verdict("shipped", figures(**{short: 0}), 5)) == 1


def test_it_says_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    missing = " ".join(what_is_missing(1000, loop_control=tmp_path / "none"))
    for each in ("root", "loop devices", *PROGRAMS):
        assert each in missing


def test_a_seed_gives_the_same_jobs_again() -> None:
    first, again, other = (Plan(seed) for seed in (7, 7, 8))
    bodies = [first.next() for _ in range(50)]
    assert bodies == [again.next() for _ in range(50)] != [other.next() for _ in range(50)]


async def test_the_lines_of_all_processes_are_read_by_time(tmp_path: Path) -> None:
    one, two = Ledger(tmp_path / "1.jsonl"), Ledger(tmp_path / "2.jsonl")
    one.note("accepted", "a")
    two.note("effect", "a", call="c1", once=False)
    one.note("seen", "a", status="completed")
    assert [note["what"] for note in read_ledgers(tmp_path)] == ["accepted", "effect", "seen"]


async def test_the_shipped_settings_are_those_of_the_deployment(tmp_path: Path) -> None:
    nats, redis = make_servers("shipped", tmp_path / "disk", tmp_path)
    async with nats, redis:
        config = (nats.data_dir / "nats.conf").read_text(), (redis.data_dir / "valkey.conf").read_text()
    assert "sync_interval: always" in config[0]
    assert "appendfsync always" in config[1]
    assert (nats.data_dir / "nats").is_dir(), "the store lies on the disk whose power is cut"
    assert (redis.data_dir / "appendonlydir").is_dir()


def test_a_line_that_is_not_there_is_not_replaced_silently() -> None:
    with pytest.raises(ValueError, match="0 lines"):
        replaced("port 1\n", "port 2", "port 3")
