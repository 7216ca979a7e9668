"""A service and a worker that know nothing but a Consul agent run a job on real parts."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

from tests.conftest import SettingsFactory
from tests.discovery.conftest import Catalogue
from toolfleet.bootstrap import open_service, open_worker
from toolfleet.services.background_jobs import NewJob
from toolfleet.services.background_jobs.task_models import Status, Tier
from toolfleet.services.web_tools.demo_site import DEMO_SECTIONS, serve_demo_site
from toolfleet.services.web_tools.server import serve_web_tools


def port_of(url: str) -> int:
    port = urlsplit(url).port
    assert port is not None
    return port


async def test_a_job_runs_with_nothing_but_consul_known(
    catalogue: Catalogue, make_settings: SettingsFactory, nats_url: str, redis_url: str
) -> None:
    tool_settings = make_settings(web_port=0, web_allow_private=True)
    async with serve_web_tools(tool_settings) as web_tools, serve_demo_site(latency_s=0) as site:
        names = make_settings()
        meta = {"stream": names.stream, "subject_prefix": names.subject_prefix}
        await catalogue.register("nats-grpc-service", port_of(nats_url), meta=meta)
        await catalogue.register("redis-grpc-service", port_of(redis_url))
        await catalogue.register("web-tools", port_of(web_tools.url), tags=["mcp"])
        settings = names.model_copy(
            update={"consul_http_addr": catalogue.address, "stream": "NOT_THIS_ONE", "subject_prefix": "nor.this"}
        )
        async with open_service(settings) as wired, open_worker(settings, Tier.HIGH) as worker:
            assert wired.core.queue.names.tasks == names.stream
            working = asyncio.create_task(worker.run())
            crawl = {"tool_name": "web_crawl", "tool_args": {"url": DEMO_SECTIONS[0].url(site)}}
            job = await wired.service.submit(NewJob.model_validate({"tools": [crawl], "priority": "high"}))
            async with asyncio.timeout(30):
                record = await wired.service.wait_until_over(job.job_id)
            results = await wired.service.results(record)
            worker.stop()
            assert await working == 0
    assert record.status is Status.COMPLETED, record.error
    crawled = results["call_1"].structured_content
    assert isinstance(crawled, dict)
    assert crawled["totals"]["pages"] > 1
