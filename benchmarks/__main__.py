"""Prints a table, and one JSON object on the last line. Missing a target is reported and is no error."""

from __future__ import annotations

import argparse
import json
import statistics
import sys

import uvloop

from benchmarks import measure
from benchmarks.stack import quiet, servers

Figures = dict[str, float | dict[str, float]]

TARGETS = {
    "ratio_1w": ("at least", 0.8),
    "durable_ratio_1w": ("at least", 0.6),
    "start_ms": ("p50 at most", 2.0),
    "round_trip_ms": ("p50 at most", 4.0),
    "sleep_2000_s": ("at most", 2.5),
    "rss_mb": ("at most", 100.0),
}


def say(text: str) -> None:
    """A line of the report, at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


async def rates(jobs: int, runs: int, *, durable: bool) -> tuple[list[float], list[float], list[float], float, float]:
    """Floor, one worker, two workers (not when durable), each by run, turn by turn; memory, CPU a job."""
    floors, ones, twos = [], [], []
    rss = cpu = 0.0
    for run in range(runs):
        async with servers(durable=durable) as stack:
            floors.append(await measure.floor_rate(stack, jobs))
        async with servers(durable=durable) as stack:
            rate, rss, cpu = await measure.throughput(stack, jobs, 1)
            ones.append(rate)
        if not durable:
            async with servers(durable=durable) as stack:
                twos.append((await measure.throughput(stack, jobs, 2))[0])
        say(f"  run {run + 1}: floor {floors[-1]:.0f}/s, one worker {ones[-1]:.0f}/s ({cpu:.0f} µs CPU a job)"
            + (f", two {twos[-1]:.0f}/s" if twos else ""))  # fmt: skip
    return floors, ones, twos, rss, cpu


async def main(jobs: int, runs: int, samples: int) -> Figures:
    """All measurements."""
    median = statistics.median
    figures: Figures = {}
    say(f"{jobs} no-op jobs, 200 B in, 200 B out, in-process tool, {runs} runs; servers at their default durability")
    floors, ones, twos, rss, cpu = await rates(jobs, runs, durable=False)
    figures["floor_1w"] = round(median(floors))
    figures["throughput_1w"] = round(median(ones))
    figures["throughput_2w"] = round(median(twos))
    figures["ratio_1w"] = round(median(one / floor for one, floor in zip(ones, floors, strict=True)), 2)
    figures["worker_cpu_us"] = round(cpu)
    figures["rss_mb"] = round(rss, 1)
    say("the same with sync_interval: always and appendfsync always")
    floors, ones, _, _, _ = await rates(jobs, runs, durable=True)
    figures["durable_floor_1w"] = round(median(floors))
    figures["durable_1w"] = round(median(ones))
    figures["durable_ratio_1w"] = round(median(one / floor for one, floor in zip(ones, floors, strict=True)), 2)
    say(f"latency on an idle queue, {samples} samples; then 2,000 jobs of one second on one worker, {runs} runs")
    async with servers(durable=False) as stack:
        starts, trips = await measure.latency(stack, samples)
    figures["start_ms"] = measure.percentiles(starts)
    figures["round_trip_ms"] = measure.percentiles(trips)
    naps = []
    for _ in range(runs):
        async with servers(durable=False) as stack:
            naps.append(await measure.sleepers(stack, 2000))
    figures["sleep_2000_s"] = round(median(naps), 2)
    return figures


def report(figures: Figures) -> None:
    """A line a figure, with its target."""
    for name, value in figures.items():
        shown = value["p50"] if isinstance(value, dict) else value
        verdict = ""
        if name in TARGETS:
            how, target = TARGETS[name]
            met = shown >= target if how == "at least" else shown <= target
            verdict = f"target {how} {target:g}: {'met' if met else 'MISSED'}"
        say(f"  {name:18} {json.dumps(value):48} {verdict}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="make bench")
    parser.add_argument("--jobs", type=int, default=5000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--samples", type=int, default=200)
    options = parser.parse_args()
    quiet()
    found = uvloop.run(main(options.jobs, options.runs, options.samples))
    report(found)
    say(json.dumps(found))
