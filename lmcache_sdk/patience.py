"""When a load is worth waiting for, and the estimates that this rests on. Pure: no clock, no I/O.

The store knows how fast its tiers are, the engine how fast it computes. A request waits for a load only while that
ends sooner than computing the same, and is given up before it has cost a tenth of that.
"""

from __future__ import annotations

SLACK = 0.03  # of the time to compute: what may be lost while nothing is known, and again where the end recedes
FIRST_WAIT_S = 2.0  # patience of an engine that has computed nothing yet
_DECAY = 0.875  # each measurement makes the earlier ones count so much less
_LEAST_SPREAD = 0.1  # measurements that are closer together than this say nothing about a slope
_LEAST_TOKENS = 128  # a shorter prefill measures other things than computing


def worth_waiting(
    waited_s: float, *, saves_s: float | None, eta_s: float | None = None, promised_s: float | None = None
) -> bool:
    """Whether to go on waiting for a load, or to compute what it would bring.

    At worst the wait is in vain and costs twice :data:`SLACK` of the time to compute: once before the tier's speed is
    known, and once where a load whose end recedes is given up; what has come by then has saved its own time.

    Args:
        waited_s: so far.
        saves_s: how long computing it would take; None = unknown.
        eta_s: until it will have come, by the latest estimate; None = unknown.
        promised_s: the whole wait, by the first estimate.
    """
    if saves_s is None:
        return waited_s + (eta_s or 0.0) < FIRST_WAIT_S
    slack = SLACK * saves_s
    if eta_s is None or promised_s is None:
        return waited_s < slack
    return waited_s + eta_s < min(promised_s + slack, saves_s)


class Line:
    """A straight line through measurements, y = base + slope * x, neither below zero; older ones count less.

    Args:
        proportional: what to think while all measurements are at about the same x: that y grows with x, or that it is
            the same everywhere.
    """

    def __init__(self, *, proportional: bool) -> None:
        self._proportional = proportional
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def add(self, x: float, y: float) -> None:
        """Take in a measurement; x is not negative."""
        self._n = self._n * _DECAY + 1
        self._x = self._x * _DECAY + x
        self._y = self._y * _DECAY + y
        self._xx = self._xx * _DECAY + x * x
        self._xy = self._xy * _DECAY + x * y

    def fit(self) -> tuple[float, float] | None:
        """(base, slope); None without a measurement."""
        if not self._n:
            return None
        x, y = self._x / self._n, self._y / self._n
        variance = self._xx / self._n - x * x
        slope = (self._xy / self._n - x * y) / variance if variance > (_LEAST_SPREAD * x) ** 2 else 0.0
        if slope <= 0:
            return (0.0, y / x) if self._proportional and x else (y, 0.0)
        base = y - slope * x
        return (base, slope) if base >= 0 else (0.0, self._xy / self._xx)

    def at(self, x: float) -> float | None:
        """y by the line; None without a measurement."""
        fit = self.fit()
        return None if fit is None else fit[0] + fit[1] * x


class PrefillSpeed:
    """How long an engine computes, from what it has computed: a token costs the more the further back it looks."""

    def __init__(self) -> None:
        self._cost = Line(proportional=False)  # seconds a token, by position

    def add(self, first: int, tokens: int, seconds: float) -> None:
        """A prefill of ``tokens`` behind ``first`` others took so long."""
        if tokens >= _LEAST_TOKENS:
            self._cost.add(first + tokens / 2, seconds / tokens)

    def seconds(self, first: int, tokens: int) -> float | None:
        """How long another one would take; None while nothing is known."""
        cost = self._cost.at(first + tokens / 2)
        return None if cost is None else cost * tokens


class ReadingSpeed:
    """How far the reads from one tier have come, and how fast they are.

    Reads run side by side and share what the tier can do, so it is not the single job that is measured but what comes
    in while anything is asked for.
    """

    _RUN_S = 0.25  # a run without end is measured in pieces of this length
    _STEP_S = 0.05

    def __init__(self) -> None:
        self.asked = 0  # bytes, in all
        self.ended = 0
        self._line = Line(proportional=True)  # seconds of a run, by its bytes
        self._since = 0.0
        self._run_bytes = 0
        self._last = 0.0

    def start(self, nbytes: int, now: float) -> None:
        """A read has been asked for."""
        if self.asked == self.ended:
            self._since = self._last = now
            self._run_bytes = 0
        self.asked += nbytes

    def end(self, nbytes: int, came: int, now: float) -> None:
        """A read of so many bytes has ended, and brought so many."""
        self.ended += nbytes
        self._run_bytes += came
        self._last = now
        if self._run_bytes and now > self._since and (self.asked == self.ended or now - self._since >= self._RUN_S):
            self._line.add(self._run_bytes, now - self._since)
            self._since, self._run_bytes = now, 0

    def seconds(self, nbytes: int) -> float | None:
        """How long so many bytes should take; None while nothing is known."""
        return self._line.at(nbytes)

    def eta_s(self, goal: int, now: float) -> float | None:
        """Seconds until ``goal`` bytes of all that was asked for have ended; None while nothing is known."""
        left = goal - self.ended
        if left <= 0:
            return 0.0
        seconds = self.seconds(left)
        # What is being read counts as it comes, but not for longer than a step should take.
        return None if seconds is None else max(0.0, seconds - min(now - self._last, 2 * self._STEP_S))

    def step_bytes(self, most: int) -> int:
        """A good size for one read: it shows how far things have come, and is not over ``most``."""
        fit = self._line.fit()
        return most if fit is None or not fit[1] else min(most, int(self._STEP_S / fit[1]))
