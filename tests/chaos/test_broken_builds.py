"""Each broken build is caught, by name and seed, and the healthy one comes well out of the same scenario."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.audit import MUST_BE_ZERO, lines
from tests.chaos.broken_builds import BROKEN
from tests.chaos.drill import again, drill
from tests.chaos.scenarios import SCENARIOS
from toolfleet.settings import Settings

SEEDS = {name: number for number, name in enumerate(SCENARIOS, 1)}


def test_every_broken_build_has_a_scenario() -> None:
    assert set(SCENARIOS) == set(BROKEN)
    assert {scenario.figure for scenario in SCENARIOS.values()} <= set(MUST_BE_ZERO)


@pytest.mark.parametrize("name", SCENARIOS)
async def test_a_broken_build_is_caught(name: str, settings: Settings, tmp_path: Path) -> None:
    verdict = await drill(name, SEEDS[name], settings, tmp_path, healthy=False)
    told = "\n".join([again(name, SEEDS[name], healthy=False), *lines(verdict)])
    assert verdict.figures[SCENARIOS[name].figure] > 0, told


@pytest.mark.parametrize("name", SCENARIOS)
async def test_the_healthy_build_comes_well_out_of_it(name: str, settings: Settings, tmp_path: Path) -> None:
    verdict = await drill(name, SEEDS[name], settings, tmp_path, healthy=True)
    assert verdict.passed, "\n".join([again(name, SEEDS[name], healthy=True), *lines(verdict)])
    assert verdict.accepted > 0
