"""The command ``lmcache-sdk``. What it prints is for people; ``--json`` is for scripts.

Exit status: 0 done, 1 failed, 2 wrong usage or configuration, 130 interrupted.
"""

from lmcache_sdk.cli.commands import app

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line of this process."""
    app(prog_name="lmcache-sdk")
