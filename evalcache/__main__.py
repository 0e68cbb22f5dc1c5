"""``python -m evalcache`` is the command ``evalcache``."""

from evalcache.cli import main

main()
