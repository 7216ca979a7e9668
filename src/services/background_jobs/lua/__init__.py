"""The Redis function library, as data files."""
