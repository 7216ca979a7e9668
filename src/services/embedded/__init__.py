"""Real servers as child processes, for `toolfleet up`, the demo, the tests and the benchmarks."""
