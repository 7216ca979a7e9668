"""nats-server and valkey as they are deployed, as they are embedded, and with the settings they come with."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from toolfleet.services.embedded.nats_server import EmbeddedNats
from toolfleet.services.embedded.server import EmbeddedServer
from toolfleet.services.embedded.valkey_server import EmbeddedValkey

STAGING: Final = Path(__file__).parents[2] / "deployment" / "staging"

CONTROL: Final = "default"
SETTINGS: Final = ("shipped", "embedded", CONTROL)
"""``shipped``: the files of deployment/staging. ``embedded``: `durable=True`. ``default``: the control, in which both
servers keep their data on the disk and sync it as they do unless told otherwise."""


def replaced(text: str, pattern: str, by: str) -> str:
    """`text` with the one line that matches replaced.

    Raises:
        ValueError: no line matches, or several do.
    """
    changed, count = re.subn(rf"^{pattern}$", by, text, flags=re.MULTILINE)
    if count != 1:
        raise ValueError(f"{count} lines match {pattern!r}, and exactly one has to be replaced")
    return changed


class _Nats(EmbeddedNats):
    """Its log lies outside of the device, which does not take a word more once its power is cut."""

    def __init__(self, data_dir: Path, logs: Path, *, durable: bool) -> None:
        super().__init__(data_dir, durable=durable)
        self._logs = logs

    @property
    def log_path(self) -> Path:
        return self._logs / f"{self.name}.log"


class _ShippedNats(_Nats):
    def _prepare(self) -> list[str]:
        command = super()._prepare()
        text = replaced(
            (STAGING / "nats.conf").read_text(), "port: 4222", f"port: {self._ports[0] if self._ports else -1}"
        )
        text = replaced(text, "http: .*", 'ports_file_dir: "."')
        (self.data_dir / command[-1]).write_text(text)
        return command


class _Valkey(EmbeddedValkey):
    def __init__(self, data_dir: Path, logs: Path, *, durable: bool) -> None:
        super().__init__(data_dir, durable=durable)
        self._logs = logs

    @property
    def log_path(self) -> Path:
        return self._logs / f"{self.name}.log"


class _ShippedValkey(_Valkey):
    def _prepare(self) -> list[str]:
        command = super()._prepare()
        text = replaced((STAGING / "redis.conf").read_text(), "port 6379", f"port {self.port}")
        (self.data_dir / command[-1]).write_text(text)
        return command


class _DefaultValkey(_Valkey):
    """Without `appendonly` it would keep nothing, which needs no test; `everysec` is what comes with turning it on."""

    def _prepare(self) -> list[str]:
        command = super()._prepare()
        config = self.data_dir / command[-1]
        config.write_text(replaced(config.read_text(), "appendfsync no", "appendfsync everysec"))
        return command


def make_servers(settings: str, device: Path, logs: Path) -> tuple[EmbeddedServer, EmbeddedServer]:
    """NATS and Redis with their data on `device`, not started; `settings` is one of `SETTINGS`."""
    if settings == "shipped":
        return _ShippedNats(device / "nats", logs, durable=True), _ShippedValkey(device / "valkey", logs, durable=True)
    if settings == "embedded":
        return _Nats(device / "nats", logs, durable=True), _Valkey(device / "valkey", logs, durable=True)
    return _Nats(device / "nats", logs, durable=False), _DefaultValkey(device / "valkey", logs, durable=False)
