"""How the next token is chosen from the logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lmcache_sdk.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Sampling:
    """Greedy unless a temperature is given.

    Attributes:
        temperature: 0 = always the most likely token.
        top_p: keep the most likely tokens whose probabilities add up to this much; 1 = all.
        top_k: keep this many of the most likely tokens; 0 = all.
        seed: the same seed gives the same tokens again; None = a fresh one.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ConfigError(f"temperature must be 0 (greedy) or above, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if self.top_k < 0:
            raise ConfigError(f"top_k must be 0 (all tokens) or above, got {self.top_k}")


GREEDY = Sampling()


class Sampler:
    """One request's choice of tokens."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self._random = torch.Generator()
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(sampling.seed)

    def __call__(self, logits: torch.Tensor) -> int:
        """logits [vocabulary] -> a token id."""
        if self._sampling.temperature == 0:
            return int(logits.argmax())
        logits = logits.to("cpu", torch.float32) / self._sampling.temperature
        ranked, ids = logits.sort(descending=True, stable=True)
        if self._sampling.top_k:
            ranked = ranked[: self._sampling.top_k]
        chances = ranked.softmax(-1)
        # A token stays if those before it do not yet reach top_p; so the first one always stays.
        chances = chances[chances.cumsum(-1) - chances < self._sampling.top_p]
        return int(ids[torch.multinomial(chances, 1, generator=self._random)])
