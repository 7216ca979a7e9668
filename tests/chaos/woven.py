"""Runs a module as the main program on a woven `toolfleet`.

``python -m tests.chaos.woven '<json>' <module> <args…>``, where the JSON is ``{"armed": [{"point": name, "nth": n,
"action": "stop" | "kill"}], "hits": "<file>", "broken": "<name>" or null, "short_grace": false}``; every part of it may
be left out. At an armed point that it reaches for the nth time the process appends ``<point> <pid>`` to the hits file,
synced to the disk, and stops or kills itself. One that is stopped is continued by whoever armed it.

A point or a broken build that does not fit the source ends the process before anything runs.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

from tests.chaos.broken_builds import BROKEN, SHORT_GRACE
from tests.chaos.points import POINTS
from tests.chaos.weaving import Armed, Trap, Weaver


def weave(told: dict[str, Any]) -> None:
    """Arm and break what the JSON says, for all that is imported from here on."""
    armed = [Armed(**one) for one in told.get("armed", ())]
    patches = [
        *(BROKEN[told["broken"]] if told.get("broken") else ()),
        *(SHORT_GRACE if told.get("short_grace") else ()),
    ]
    hits = Path(told["hits"]) if told.get("hits") else None
    Weaver({one.point: POINTS[one.point] for one in armed}, patches, Trap(armed, hits)).install()


def main() -> None:
    """Weave, then become the module."""
    told, module, *arguments = sys.argv[1:]
    weave(json.loads(told))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
