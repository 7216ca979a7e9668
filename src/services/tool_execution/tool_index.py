"""Names of tools: which spec a name stands for, given what each server lists."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from typing import Final

from toolfleet.services.background_jobs.errors import UnknownTool
from toolfleet.services.background_jobs.ports import ToolSpec
from toolfleet.services.tool_execution.catalogue_store import ServerTools
from toolfleet.services.tool_execution.policy import Policy, policy_of

_NEAREST: Final = 5
_CUTOFF: Final = 0.5
"""Likeness (difflib's ratio) from which a name counts as near."""


class ToolIndex:
    """An immutable index of tools by name: ``server/tool`` always, ``tool`` where one server offers it.

    A server that the registry does not name at present still counts, so that its jobs can be queued while it is down;
    but it makes no name ambiguous: a tool that moved to another server is found there.

    Args:
        known: what each server listed last.
        live: the servers that the registry names; None where that is not known.
        overrides: `Settings.tool_policy`.
    """

    def __init__(
        self, known: Iterable[ServerTools], live: Collection[str] | None, overrides: Mapping[str, Policy]
    ) -> None:
        offers: dict[str, list[tuple[str, bool]]] = {}
        tools = {}
        for listing in known:
            present = live is None or listing.server in live
            for tool in listing.tools:
                offers.setdefault(tool["name"], []).append((listing.server, present))
                tools[listing.server, tool["name"]] = tool, present
        chosen = {
            name: [server for server, present in found if present] or [server for server, _ in found]
            for name, found in offers.items()
        }
        self._qualified: dict[str, ToolSpec] = {}
        self._present: list[ToolSpec] = []
        for (server, name), (tool, present) in tools.items():
            policy = policy_of(server, name, tool["annotations"], overrides)
            spec = ToolSpec(
                name=name if chosen[name] == [server] else f"{server}/{name}",
                server=server,
                tool=name,
                description=tool["description"],
                input_schema=tool["inputSchema"],
                repeatable=policy.repeatable,
                policy_source=policy.source,
            )
            self._qualified[f"{server}/{name}"] = spec
            if present:
                self._present.append(spec)
        self._plain = {name: [f"{server}/{name}" for server in servers] for name, servers in chosen.items()}
        self._present.sort(key=lambda spec: spec.name)

    @property
    def tools(self) -> list[ToolSpec]:
        """The tools of the servers that are there, by name."""
        return list(self._present)

    @property
    def empty(self) -> bool:
        """Whether no server has ever listed anything."""
        return not self._qualified

    def get(self, name: str) -> ToolSpec | None:
        """The spec that a name stands for, or None.

        Raises:
            UnknownTool: several servers offer a tool of this name; ``details["nearest"]`` has the full names,
                and ``details["ambiguous"]`` is true.
        """
        spec = self._qualified.get(name)
        if spec is not None:
            return spec
        full = self._plain.get(name, [])
        if len(full) > 1:
            either = " or ".join(f"'{one}'" for one in sorted(full))
            raise UnknownTool(
                f"several servers offer a tool '{name}'; say which: {either}", nearest=sorted(full), ambiguous=True
            )
        return self._qualified[full[0]] if full else None

    def unknown(self, name: str) -> UnknownTool:
        """The refusal of a name that stands for nothing, with the nearest ones."""
        names = {spec.name for spec in self._present} | set(self._qualified)
        nearest = difflib.get_close_matches(name, sorted(names), n=_NEAREST, cutoff=_CUTOFF)
        # A plain name and its full form say the same; one of them is enough.
        nearest = [one for one in nearest if one.partition("/")[2] not in nearest]
        hint = f"; near: {', '.join(nearest)}" if nearest else ""
        return UnknownTool(f"no tool server of the fleet offers a tool '{name}'{hint}", nearest=nearest)
