"""``python -m lmcache_sdk.cli``."""

from lmcache_sdk.cli import main

main()
