"""Leaving a tier alone that keeps failing."""


class Breaker:
    """Stops asking a tier that failed ``threshold`` times in a row; lets one call try again after a while."""

    def __init__(self, threshold: int = 3, pause_s: float = 2.0, longest_pause_s: float = 60.0) -> None:
        self._threshold = threshold
        self._pause_s = self._first_pause_s = pause_s
        self._longest_pause_s = longest_pause_s
        self._failures = 0
        self._open_until = 0.0

    @property
    def state(self) -> str:
        return "open" if self._failures >= self._threshold else "closed"

    def allows(self, now: float) -> bool:
        if self._failures < self._threshold:
            return True
        if now < self._open_until:
            return False
        self._open_until = now + self._pause_s  # this caller tries; the others wait for what it finds
        return True

    def record(self, success: bool, now: float) -> None:
        if success:
            self._failures = 0
            self._pause_s = self._first_pause_s
            return
        self._failures += 1
        if self._failures >= self._threshold:
            self._open_until = now + self._pause_s
            self._pause_s = min(2 * self._pause_s, self._longest_pause_s)
