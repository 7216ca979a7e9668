"""The scenario of a broken build, played by that build or by the healthy one, and what the audit says of it.

``python -m tests.chaos.drill NAME --seed N`` plays it on servers of its own with the broken build, and fails; with
``--healthy`` it passes. The seed names the jobs, so it decides on their ids and on where Redis keeps them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Final

import uvloop

from tests.chaos.audit import Verdict, lines
from tests.chaos.crew import open_crew
from tests.chaos.scenarios import SCENARIOS
from toolfleet.services.embedded.nats_server import EmbeddedNats
from toolfleet.services.embedded.valkey_server import EmbeddedValkey
from toolfleet.settings import Settings

MODULE: Final = "tests.chaos.drill"


async def drill(name: str, seed: int, settings: Settings, folder: Path, *, healthy: bool) -> Verdict:
    """Play a scenario.

    Args:
        name: of the broken build.
        seed: of the jobs.
        settings: where the servers are; their streams must be the drill's own.
        folder: for logs and ledgers.
        healthy: whether the build is the healthy one.
    """
    scenario = SCENARIOS[name]
    async with open_crew(
        settings,
        folder,
        overrides=scenario.overrides,
        broken=None if healthy else name,
        short_grace=scenario.short_grace,
        seed=seed,
    ) as crew:
        await scenario.play(crew)
        return await crew.verdict()


def again(name: str, seed: int, *, healthy: bool) -> str:
    """The command that plays it again."""
    return f"python -m {MODULE} {name} --seed {seed}" + (" --healthy" if healthy else "")


async def _on_own_servers(name: str, seed: int, folder: Path, *, healthy: bool) -> Verdict:
    async with (
        EmbeddedNats(folder / "nats", durable=False) as nats,
        EmbeddedValkey(folder / "valkey", durable=False) as valkey,
    ):
        values = {
            "nats_url": nats.url,
            "redis_url": valkey.url,
            "state_dir": folder / "run",
            "stream_max_bytes": 1 << 26,
            "dlq_max_bytes": 1 << 24,
        }
        return await drill(name, seed, Settings.model_validate(values), folder, healthy=healthy)


def main() -> int:
    """0 where every promise was kept, 1 where one was broken."""
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", description=__doc__)
    parser.add_argument("name", choices=sorted(SCENARIOS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--healthy", action="store_true", help="play it with the build as it is")
    told = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix=f"toolfleet-drill-{told.name}-"))
    print(f"{again(told.name, told.seed, healthy=told.healthy)}: everything lies in {folder}", flush=True)
    verdict = uvloop.run(_on_own_servers(told.name, told.seed, folder, healthy=told.healthy))
    for line in lines(verdict):
        print(line)
    print(json.dumps({"accepted": verdict.accepted, "terminal": verdict.terminal, **verdict.figures}))
    return 0 if verdict.passed else 1


if __name__ == "__main__":
    sys.exit(main())
