"""How far two engines may be apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

MOST_KL = 0.01
MOST_K_ERROR, MOST_V_ERROR = 0.02, 0.04
LEAST_MARGIN = 0.5  # of log probability: below it the second token is as good as the first


def divergence(own: Mapping[int, float], other: Mapping[int, float]) -> float:
    """KL(own || other) of two distributions of which the most likely tokens are known, with log probabilities: over
    those of ``own``, and all else as one. A token that ``other`` does not tell is as likely there as the last that it
    does, at the most.
    """
    least = min(other.values())
    both = [(math.exp(chance), math.exp(other.get(token, least))) for token, chance in own.items()]
    both.append((max(1e-9, 1 - sum(p for p, _ in both)), max(1e-9, 1 - sum(q for _, q in both))))
    return sum(p * math.log(p / q) for p, q in both)


def first_difference(own: Sequence[int], other: Sequence[int], margins: Sequence[float]) -> int | None:
    """The number of the first token that differs though the engine was sure of its own; None if there is none.

    What comes behind one of which it was not sure, and that differs, is an answer to another text.

    Args:
        margins: how far the most likely token was ahead of the second, by log probability, for each of ``own``.
    """
    for number, (mine, theirs, margin) in enumerate(zip(own, other, margins, strict=True)):
        if mine != theirs:
            return number if margin >= LEAST_MARGIN else None
    return None
