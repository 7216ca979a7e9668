"""A power cut under load: how many acknowledged jobs and results are gone afterwards. Run by `make powercut`, as root.

Killing a server loses nothing that it has written, since the kernel's page cache outlives it. Only a file system that
stops taking anything, as its disk does without power, tells a synced write from one that only looked like it.
"""
