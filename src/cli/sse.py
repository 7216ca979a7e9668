"""Server-sent events as a client reads them (WHATWG HTML, 9.2): lines become events."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """One event of a job's stream."""

    id: int | None
    """Its place in the job's log; None for what is not in the log, such as a gap."""
    event: str
    data: dict[str, Any] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """For `--json`: one object a line."""
        return {"id": self.id, "event": self.event, "data": self.data}


class SseDecoder:
    """Collects the lines of one stream; comments (heartbeats) and unknown fields are passed over."""

    def __init__(self) -> None:
        self._id: int | None = None
        self._event = ""
        self._data: list[str] = []

    def feed(self, line: str) -> ServerEvent | None:
        """The event that this line, without its end, completes."""
        if not line:
            return self._complete()
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            self._data.append(value)
        elif name == "event":
            self._event = value
        elif name == "id":
            self._id = int(value) if value.isdecimal() else None
        return None

    def _complete(self) -> ServerEvent | None:
        number, kind, data = self._id, self._event or "message", "\n".join(self._data)
        # The id of an event is not that of the next: an event without one (a gap) is not in the log.
        self._id, self._event, self._data = None, "", []
        if not data:
            return None
        try:
            content = json.loads(data)
        except ValueError:
            content = {"text": data}
        return ServerEvent(number, kind, content if isinstance(content, dict) else {"value": content})
