"""`make bench`: throughput, latency and memory of one or two workers beside a bare loop in the same run."""
