"""Tiny models that are made in a second: random weights, a byte-level tokenizer, a ChatML template."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

from lmcache_adapters.hf import Runner
from lmcache_sdk.testing.harness import EngineHarness

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTEXT = 2048


def tiny_config(**changes: Any) -> LlamaConfig:
    facts = {
        "num_hidden_layers": 4,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.2,  # large enough for attention to matter in random weights
        "eos_token_id": 2,
        "bos_token_id": None,
        "dtype": "float32",
    }
    return LlamaConfig(**{**facts, **changes})


def make_tokenizer(directory: Path) -> None:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *letters))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", additional_special_tokens=list(SPECIAL[:2])
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(directory)


def make_model(directory: Path, *, seed: int = 0, **changes: Any) -> Path:
    torch.manual_seed(seed)
    LlamaForCausalLM(tiny_config(**changes)).save_pretrained(directory)
    make_tokenizer(directory)
    return directory


def write_config(directory: Path, config: PreTrainedConfig) -> Path:
    """A model that is to be refused before its weights would be read."""
    config.save_pretrained(directory)
    return directory


def some_ids(count: int, seed: int = 0) -> list[int]:
    """Ids of bytes, so that they also decode; never a special token."""
    return np.random.default_rng(seed).integers(len(SPECIAL), 200, count).tolist()


def split_logits(runner: Runner, ids: list[int], cached: int) -> np.ndarray:
    """The reference: the whole prompt in one forward, then the same prompt again behind its first ``cached`` rows."""
    runner.memory.rewind(0)
    runner.model.forward(ids, runner.memory.cache)
    runner.memory.rewind(cached)
    return runner.model.forward(ids[cached:], runner.memory.cache).float().numpy()


def digest(logits: np.ndarray) -> str:
    return hashlib.sha256(logits.tobytes()).hexdigest()


def engine(model: Path, *options: str) -> EngineHarness:
    return EngineHarness([sys.executable, "-m", "lmcache_adapters.hf.engine", "--model", str(model), *options])
