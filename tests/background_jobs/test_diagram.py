"""The picture in README.md is the table in the code."""

from __future__ import annotations

import re
from pathlib import Path

import toolfleet.services.background_jobs as package
from toolfleet.services.background_jobs.task_models import Status
from toolfleet.services.background_jobs.transitions import LEGAL_MOVES, REOPENING_MOVES

FOLDER = Path(str(package.__file__)).parent
README = (FOLDER / "README.md").read_text(encoding="utf-8")


def drawn_moves() -> set[tuple[Status | None, Status]]:
    (diagram,) = re.findall(r"```mermaid\nstateDiagram-v2\n(.*?)```", README, re.DOTALL)
    moves: set[tuple[Status | None, Status]] = set()
    for line in diagram.strip().splitlines():
        arrow = re.fullmatch(r"\s*(\[\*\]|\w+) --> (\w+): \S.*", line)
        assert arrow is not None, f"not an arrow with a reason: {line!r}"
        old, new = arrow.groups()
        move = (None if old == "[*]" else Status(old), Status(new))
        assert move not in moves, f"drawn twice: {line!r}"
        moves.add(move)
    return moves


def test_the_diagram_shows_every_legal_move_and_no_other() -> None:
    assert drawn_moves() == LEGAL_MOVES | REOPENING_MOVES


def test_nothing_leaves_a_terminal_status_within_a_generation() -> None:
    assert not any(old is not None and old.terminal for old, _ in LEGAL_MOVES)
    assert all(old.terminal for old, _ in REOPENING_MOVES)


def test_every_file_is_in_the_table() -> None:
    named = set(re.findall(r"`(\w+\.py)`", README))
    assert named == {path.name for path in FOLDER.glob("*.py")} - {"__init__.py"}
    assert {path.stem for path in (FOLDER / "lua").glob("*.lua")} == set(re.findall(r"`(\d\d_\w+)`", README))
