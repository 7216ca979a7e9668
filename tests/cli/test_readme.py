"""The README's lines, run as they stand but for the ports."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.cli.conftest import Fleet
from tests.cli.running import clean_env

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")


def printed(fleet: Fleet, line: str) -> str:
    """What a line prints, against this stack instead of one on the default ports."""
    for default, actual in (
        ("localhost:8081", urlsplit(fleet.api).netloc),
        ("127.0.0.1:8082", urlsplit(fleet.site).netloc),
    ):
        line = line.replace(default, actual)
    ended = subprocess.run(
        ["/bin/sh", "-c", line], env=clean_env(), capture_output=True, text=True, timeout=60, check=True
    )
    return ended.stdout


def last_json(text: str) -> Any:
    """The last of the JSON objects that stand one behind the other."""
    decoder, at, value = json.JSONDecoder(), 0, None
    while at < len(text.rstrip()):
        value, at = decoder.raw_decode(text, at)
    return value


def test_the_curl_lines_work(fleet: Fleet) -> None:
    section = README[README.index("## Five lines to try") :]
    block = re.search(r"```sh\n(.*?)```", section, re.DOTALL)
    assert block is not None
    submit, stream, poll, result, cancel = block[1].strip().splitlines()
    job_id = last_json(printed(fleet, submit))["job_id"]
    assert job_id in stream, "the README names the id that its key gives"
    followed = printed(fleet, stream)
    assert "event: tool.progress" in followed
    assert "event: job.completed" in followed
    assert last_json(printed(fleet, poll))["status"] == "completed"
    assert last_json(printed(fleet, result))["results"][0]["structured_content"]["totals"]["pages"] == 37
    assert last_json(printed(fleet, cancel))["outcome"] == "cancelled"


def test_every_promise_is_named() -> None:
    assert re.findall(r"^\| (G\d+) \|", README, re.MULTILINE) == [f"G{number}" for number in range(1, 13)]
