"""A conversation that keeps its token ids, so that each turn finds the KV of all earlier ones.

Rendering the whole history again and tokenising it would not give the same ids: a reply's text may be
tokenised differently from how it was generated, and from there on no chunk would match. So a turn only ever appends.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from lmcache_adapters.hf.runner import Result, Runner
from lmcache_sdk.errors import ConfigError
from lmcache_sdk.keys import Tokens

# Stands for the reply when the template is asked what comes between it and the next turn's reply.
_REPLY = "lmcache-sdk-reply-goes-here"


class Chat:
    """One conversation.

    Args:
        runner: what generates; it may serve other conversations, too.
        system: the system message, if any.
        settings: keyword arguments of :meth:`Runner.generate` for every turn (sampling, stop, cache_salt …).
    """

    def __init__(self, runner: Runner, *, system: str | None = None, **settings: Any) -> None:
        self._runner = runner
        self._opening = [{"role": "system", "content": system}] if system else []
        self._settings = settings
        self.token_ids: Tokens = np.empty(0, dtype=np.uint32)

    def say(self, text: str, **settings: Any) -> Result:
        """The model's reply to one message. If it cannot be given, the conversation stays as it was.

        Args:
            settings: keyword arguments of :meth:`Runner.generate` for this turn.

        Raises:
            ConfigError: as :meth:`Runner.generate`; a conversation that outgrew the context cannot go on.
        """
        prompt = np.concatenate([self.token_ids, self._turn(text)])
        result = self._runner.generate(prompt, **{**self._settings, **settings})
        reply = result.token_ids
        if reply[-1] in self._runner.model.end_ids:
            # The next turn begins with the template's own end of the reply, which may be another token.
            reply = reply[:-1]
        self.token_ids = np.concatenate([prompt, np.asarray(reply, dtype=np.uint32)])
        return result

    def _turn(self, text: str) -> Tokens:
        """Token ids of what a message adds, up to where the reply to it begins."""
        model = self._runner.model
        message = {"role": "user", "content": text}
        if self.token_ids.size:
            turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _REPLY}, message]
            _, found, rendered = model.render([*self._opening, *turns]).partition(_REPLY)
            if not found:
                raise ConfigError(f"the chat template of {model.namespace.label} leaves earlier replies out")
        else:
            rendered = model.render([*self._opening, message])
        return np.asarray(model.tokenize(rendered), dtype=np.uint32)
