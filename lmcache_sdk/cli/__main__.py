"""``python -m lmcache_sdk.cli``."""

from lmcache_sdk.cli import main

if __name__ == "__main__":
    main()
