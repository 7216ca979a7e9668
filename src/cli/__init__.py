"""The command line: `toolfleet …`. `main` has the commands, the other modules do their work."""
