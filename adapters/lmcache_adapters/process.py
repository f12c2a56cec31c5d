"""What engine processes that speak JSON lines have in common. The protocol is in ``lmcache_sdk.testing.harness``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

TOP = 20  # most likely tokens in an answer with ``logits``

Answer = dict[str, Any]


def take_stdout() -> Callable[[Answer], None]:
    """What writes an answer. From now on stdout is for answers alone: whatever else prints, in Python or below it, goes
    to stderr.
    """
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(fields: Answer) -> None:
        answers.write(json.dumps(fields) + "\n")
        answers.flush()

    return answer


def margin(chances: Sequence[float]) -> float:
    """How far the most likely token is ahead of the second, by log probability."""
    first, second = sorted(chances, reverse=True)[:2]
    return first - second


def pairs(given: Sequence[str]) -> dict[str, Any]:
    """``name=JSON``, or ``name=text`` where that is no JSON."""
    found: dict[str, Any] = {}
    for pair in given:
        name, _, value = pair.partition("=")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found
