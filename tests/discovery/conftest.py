"""A Consul catalogue that a test fills, and that is empty again after it."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Mapping, Sequence

import pytest

from tests.support.waiting import wait_until
from toolfleet.services.discovery.consul_client import ConsulClient
from toolfleet.services.embedded.consul_agent import EmbeddedConsul


class Catalogue:
    """Registers services at a real agent; `register` returns when the agent serves them."""

    def __init__(self, agent: EmbeddedConsul, token: str | None = None) -> None:
        self.address = agent.address
        self._client = ConsulClient(agent.address, token, timeout=5)
        self._ids: list[str] = []

    async def register(
        self,
        name: str,
        port: int,
        *,
        address: str | None = "127.0.0.1",
        status: str = "passing",
        tags: Sequence[str] = (),
        meta: Mapping[str, str] | None = None,
    ) -> str:
        """One instance whose check has the status from the start; the TTL outlasts every test."""
        instance = f"{name}-{uuid.uuid4().hex[:8]}"
        await self._client.agent.service.register(
            name,
            service_id=instance,
            address=address,
            port=port,
            tags=list(tags),
            meta=dict(meta or {}),
            check={"ttl": "10m", "status": status},
        )
        self._ids.append(instance)
        await wait_until(lambda: self._is_served(name, instance), f"the agent serves {instance}")
        return instance

    async def fail(self, name: str, instance: str) -> None:
        """Turns the instance's check critical; returns when it is no longer among the passing ones."""
        await self._client.agent.check.ttl_fail(f"service:{instance}")
        await wait_until(lambda: self._is_critical(name, instance), f"{instance} is critical")

    async def close(self) -> None:
        for instance in self._ids:
            await self._client.agent.service.deregister(instance)
        await self.leave()

    async def leave(self) -> None:
        """Without deregistering: for an agent that is gone."""
        await self._client.http.close()

    async def _instances(self, name: str, *, passing: bool) -> set[str]:
        _, entries = await self._client.health.service(name, passing=passing)
        return {entry["Service"]["ID"] for entry in entries}

    async def _is_served(self, name: str, instance: str) -> bool:
        return instance in await self._instances(name, passing=False)

    async def _is_critical(self, name: str, instance: str) -> bool:
        return instance not in await self._instances(name, passing=True)


@pytest.fixture
async def catalogue(consul_agent: EmbeddedConsul) -> AsyncIterator[Catalogue]:
    opened = Catalogue(consul_agent)
    yield opened
    await opened.close()
