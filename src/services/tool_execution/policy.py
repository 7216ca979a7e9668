"""Which tools may run twice.

A call that is neither read-only nor idempotent must not be started again once its outcome is unknown (G5), so the
answer decides what a crash costs, or an answer that does not say whether the tool ran (`ToolAnswerUnclear`: HTTP 5xx,
half a body): a call that may run twice is made again, any other makes its job `unknown`. The tool's own annotations are
hints of its author, and the MCP specification asks clients not to trust those of an untrusted server; an operator who
knows better overrules them with `Settings.tool_policy`, for one tool or for all of a server.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from typing import Any, Final, Literal, NamedTuple

Policy = Literal["repeatable", "once"]
PolicySource = Literal["annotation", "default", "setting"]
_DECIDING: Final = ("readOnlyHint", "idempotentHint")
_NEAREST: Final = 3


class ToolPolicy(NamedTuple):
    """Whether a tool may run twice, and who says so."""

    repeatable: bool
    source: PolicySource
    """`default` where the tool says nothing."""


def policy_of(server: str, tool: str, annotations: Mapping[str, Any], overrides: Mapping[str, Policy]) -> ToolPolicy:
    """Whether a call of the tool may run again after an attempt whose outcome is not known.

    The most specific entry of `overrides` decides: ``server/tool``, then ``tool``, then ``server/*``. Without one the
    annotations do, with the defaults of the MCP schema (`ToolAnnotations`): `readOnlyHint` false, `destructiveHint`
    true, `idempotentHint` false, `openWorldHint` true; so a tool that says nothing is run once. `destructiveHint` has
    no say: a harmless write that is done twice is still done twice. Nor has `openWorldHint`: a closed world can be
    changed twice as well.
    """
    for name in (f"{server}/{tool}", tool, f"{server}/*"):
        policy = overrides.get(name)
        if policy is not None:
            return ToolPolicy(policy == "repeatable", "setting")
    said = [annotations[hint] for hint in _DECIDING if isinstance(annotations.get(hint), bool)]
    return ToolPolicy(any(said), "annotation" if said else "default")


def unused_overrides(
    overrides: Mapping[str, Policy], tools: Mapping[str, Collection[str]], unlisted: Collection[str]
) -> list[str]:
    """A sentence for each entry of `overrides` that names no tool: a misspelt `once` protects nothing.

    Args:
        overrides: `Settings.tool_policy`.
        tools: the names of each server's tools.
        unlisted: servers whose tools are not known; what may be one of theirs is not told.
    """
    full = [f"{server}/{tool}" for server, names in tools.items() for tool in names]
    plain = {tool for names in tools.values() for tool in names}
    known = [*full, *plain, *(f"{server}/*" for server in tools)]
    found = []
    for entry in sorted(overrides):
        server, slash, _ = entry.partition("/")
        if entry in known or (server in unlisted if slash else unlisted):
            continue
        near = difflib.get_close_matches(entry, sorted(known), n=_NEAREST)
        hint = f"; near: {', '.join(near)}" if near else ""
        found.append(f"TOOLFLEET_TOOL_POLICY has an entry for '{entry}', and there is no such tool or server{hint}")
    return found
