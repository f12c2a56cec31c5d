"""Token ids in, text out, while they are generated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_INCOMPLETE = "\ufffd"


class TextStream:
    """Decodes one request's generated tokens.

    What may still change is held back: the bytes of a character that is not complete, and an end that may
    become a stop string.

    Args:
        tokenizer: of the model; None = no text at all.
        stop: generation ends where one of these appears; neither it nor what follows is part of the text.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._text = ""
        self._shown = 0

    def push(self, token: int) -> str:
        """Take one token; the answer is the text that has become certain."""
        if self._tokenizer is None or self.stopped:
            return ""
        self._ids.append(token)
        # Decoded whole each time, since a token's text depends on its neighbours; next to a forward pass it is cheap.
        self._text = self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        found = [at for at in (self._text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            self._text = self._text[: min(found)]
            return self._show(len(self._text))
        return self._show(self._certain())

    def finish(self) -> str:
        """No more tokens: the answer is what was held back."""
        return self._show(len(self._text))

    @property
    def text(self) -> str:
        """Everything so far, including what is held back."""
        return self._text

    def _show(self, end: int) -> str:
        start, self._shown = self._shown, max(self._shown, end)
        return self._text[start:end]

    def _certain(self) -> int:
        text = self._text.rstrip(_INCOMPLETE)
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self._stop):
                return len(text) - length
        return len(text)
