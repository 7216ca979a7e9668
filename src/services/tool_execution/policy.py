"""Which tools may run twice.

A call that is neither read-only nor idempotent must not be started again once its outcome is unknown (G5), so the
answer decides what a crash costs. The tool's own annotations are hints of its author; an operator who knows better
overrules them with `Settings.tool_policy`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Policy = Literal["repeatable", "once"]


def is_repeatable(server: str, tool: str, annotations: Mapping[str, Any], overrides: Mapping[str, Policy]) -> bool:
    """Whether a call of the tool may run again after an attempt whose outcome is not known.

    The most specific entry of `overrides` decides: ``server/tool``, then ``tool``, then ``server/*``. Without one the
    annotations do, with the defaults of the MCP schema (`ToolAnnotations`): `readOnlyHint` false, `destructiveHint`
    true, `idempotentHint` false; so a tool that says nothing is run once. `destructiveHint` has no say: a harmless
    write that is done twice is still done twice.
    """
    for name in (f"{server}/{tool}", tool, f"{server}/*"):
        policy = overrides.get(name)
        if policy is not None:
            return policy == "repeatable"
    return annotations.get("readOnlyHint") is True or annotations.get("idempotentHint") is True
