"""`python -m toolfleet.cli`: the same as the `toolfleet` program, for processes that start others of this tree."""

from __future__ import annotations

from toolfleet.cli.main import main

if __name__ == "__main__":
    main()
