"""Loading a model: what it is to the cache (namespace, producer), and whether it is served at all."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import transformers
from transformers.cache_utils import DynamicCache, DynamicLayer

from lmcache_sdk.errors import ConfigError, UnsupportedError
from lmcache_sdk.keys import Tokens, as_tokens
from lmcache_sdk.spec import (
    DEFAULT_CHUNK_TOKENS,
    Group,
    Namespace,
    Producer,
    namespace_of,
    refuse_unserved,
    weights_fingerprint,
)

DTYPES = ("bfloat16", "float16", "float32")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt")

Messages = Sequence[Mapping[str, str]]
Prompt = str | Messages | Sequence[int] | np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class Model:
    """A loaded causal language model; may be shared by several runners, one after the other.

    Attributes:
        network: the transformers model, in inference mode.
        tokenizer: None if the directory has none; then only token ids can be given.
        end_ids: tokens that end a reply.
        context_tokens: the longest sequence the model was made for.
    """

    network: Any
    tokenizer: Any
    namespace: Namespace
    producer: Producer
    device: torch.device
    end_ids: frozenset[int]
    context_tokens: int

    @property
    def group(self) -> Group:
        """The KV geometry; full attention throughout is one group."""
        return self.namespace.spec.groups[0]

    def forward(self, tokens: Sequence[int] | Tokens, cache: Any) -> torch.Tensor:
        """Run tokens behind what ``cache`` holds, and append their KV to it.

        Returns:
            The logits after the last token, [vocabulary].
        """
        ids = torch.as_tensor(np.asarray(tokens, dtype=np.int64), device=self.device)[None]
        with torch.inference_mode():
            output = self.network(input_ids=ids, past_key_values=cache, use_cache=True, **self._last_only())
        logits: torch.Tensor = output.logits[0, -1]
        return logits

    def _last_only(self) -> dict[str, int]:
        """Most models can leave out the logits of all positions but the last, which for a long prompt are large."""
        parameters = inspect.signature(self.network.forward).parameters
        return {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}

    def encode(self, prompt: Prompt) -> Tokens:
        """A prompt's token ids: text is tokenised, messages go through the chat template, ids are taken as they are.

        Raises:
            ConfigError: nothing to encode, ids outside the vocabulary, or a tokenizer or template that is
            missing.
        """
        if not isinstance(prompt, str) and not hasattr(prompt, "__len__"):
            raise ConfigError(f"a prompt is text, messages or token ids, not {prompt!r}")
        if isinstance(prompt, str):
            ids = self._tokenizer_for("text")(prompt)["input_ids"] if prompt else []
        elif len(prompt) and isinstance(prompt[0], Mapping):
            ids = self.tokenize(self.render(cast(Messages, prompt)))
        else:
            ids = prompt
        tokens = as_tokens(ids)
        vocabulary = int(self.network.get_input_embeddings().num_embeddings)
        if tokens.size == 0:
            raise ConfigError("the prompt is empty; give at least one token")
        if int(tokens.max()) >= vocabulary:
            raise ConfigError(f"token id {int(tokens.max())} is outside the model's vocabulary of {vocabulary}")
        return tokens

    def render(self, messages: Messages) -> str:
        """Messages through the model's chat template, up to where the reply begins."""
        tokenizer = self._tokenizer_for("messages")
        if not tokenizer.chat_template:
            raise ConfigError(f"{self.namespace.label} has no chat template; give the prompt as text or token ids")
        for message in messages:
            if not {"role", "content"} <= message.keys():
                raise ConfigError(f"a message has a role and content, this has not: {message!r}")
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        return text

    def tokenize(self, text: str) -> list[int]:
        """Token ids of text that holds its special tokens already."""
        ids: list[int] = self._tokenizer_for("text")(text, add_special_tokens=False)["input_ids"]
        return ids

    def _tokenizer_for(self, what: str) -> Any:
        if self.tokenizer is None:
            raise ConfigError(f"{self.namespace.label} has no tokenizer, so {what} cannot be used; give token ids")
        return self.tokenizer


def load_model(
    source: str | os.PathLike[str],
    *,
    device: str = "cpu",
    dtype: str | None = None,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    attention: str = "sdpa",
) -> Model:
    """Load a causal language model whose layers are all full attention.

    Args:
        source: a model directory, or an id on the Hugging Face hub.
        device: a torch device.
        dtype: of weights and KV, one of :data:`DTYPES`; by default what the model's config says.
        chunk_tokens: the fleet's chunk size; KV of another chunk size is not found.
        attention: a transformers attention implementation; another one is another producer.

    Raises:
        ConfigError: no such model, device or dtype.
        UnsupportedError: the model, by name, and what about it is not served.
    """
    directory = _resolve(source)
    config = _read(transformers.AutoConfig, directory)
    # Refused before the weights are read: that may take minutes.
    refuse_unserved(config.to_dict())
    _refuse_length_dependent_rope(config)
    _refuse_mixed_layers(config)
    name = _dtype_name(dtype, config)
    place = _device(device)
    namespace = namespace_of(
        config.get_text_config().to_dict(),
        fingerprint=weights_fingerprint(directory),
        dtype=name,
        chunk_tokens=chunk_tokens,
        label=directory.name if Path(source).is_dir() else str(source),
        source=str(directory),
    )
    network = _read(
        transformers.AutoModelForCausalLM,
        directory,
        dtype=getattr(torch, name),
        attn_implementation=attention,
    )
    network = network.to(place).eval()
    _check_kv(network, namespace.spec.groups[0])
    tokenizer = _read(transformers.AutoTokenizer, directory) if _has_tokenizer(directory) else None
    version = f"{transformers.__version__}-torch{torch.__version__}-{attention}-{name}"
    return Model(
        network=network,
        tokenizer=tokenizer,
        namespace=namespace,
        producer=Producer("hf", version, _device_kind(place)),
        device=place,
        end_ids=_end_ids(network, tokenizer),
        context_tokens=int(config.get_text_config().max_position_embeddings),
    )


def _resolve(source: str | os.PathLike[str]) -> Path:
    """The directory of a model; a hub id is downloaded, or found in the hub's own cache."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path.resolve()
    text = os.fspath(source)
    if text.startswith(("/", ".", "~")) or text.count("/") > 1:
        raise ConfigError(f"no model directory at {text}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(text, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{text!r} is neither a directory nor a model on the hub that can be read: {error}"
        ) from error


def _read(factory: Any, directory: Path, **settings: Any) -> Any:
    try:
        return factory.from_pretrained(directory, **settings)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"cannot load the model in {directory}: {error}") from error


def _has_tokenizer(directory: Path) -> bool:
    """Without files, transformers would make a tokenizer that knows no words."""
    return any((directory / name).is_file() for name in TOKENIZER_FILES)


def _dtype_name(dtype: str | None, config: Any) -> str:
    name = str(dtype or config.dtype or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(f"unknown dtype {name!r}; choose one of: {', '.join(DTYPES)}")
    return name


def _device(device: str) -> torch.device:
    try:
        place = torch.device(device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
    return place


def _device_kind(device: torch.device) -> str:
    return "rocm" if device.type == "cuda" and torch.version.hip else device.type


def _end_ids(network: Any, tokenizer: Any) -> frozenset[int]:
    ids: set[int] = set()
    for source in (network.generation_config, tokenizer):
        found = getattr(source, "eos_token_id", None)
        ids.update([found] if isinstance(found, int) else found or ())
    return frozenset(ids)


def _refuse_length_dependent_rope(config: Any) -> None:
    """Some RoPE variants rotate by frequencies of the whole sequence's length, so that a prefix's K is not its own."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kind = rope.get("rope_type")
    if kind in ("dynamic", "longrope"):
        raise UnsupportedError(
            f"{config.model_type} has RoPE of type {kind!r}: its keys depend on the length of the whole "
            "sequence, so that those of a prefix cannot be reused"
        )


def _refuse_mixed_layers(config: Any) -> None:
    kinds = {type(layer).__name__ for layer in DynamicCache(config=config).layers} - {DynamicLayer.__name__}
    if kinds:
        raise UnsupportedError(
            f"{config.model_type} has cache layers of type {', '.join(sorted(kinds))}; only full attention is served"
        )


def _check_kv(network: Any, group: Group) -> None:
    """One token through the model shows what it really caches, whatever its config seems to say."""
    cache = DynamicCache(config=network.config)
    with torch.inference_mode():
        network(input_ids=torch.zeros((1, 1), dtype=torch.long, device=network.device), past_key_values=cache)
    expected = (1, group.heads, 1, group.dim)
    for number, layer in enumerate(cache.layers):
        found = [(tuple(side.shape), side.dtype) if side is not None else None for side in (layer.keys, layer.values)]
        if found != [(expected, getattr(torch, group.dtype))] * 2:
            raise UnsupportedError(
                f"{network.config.model_type} caches K and V of {found} in layer {number}; "
                f"served is {expected} of {group.dtype} for both"
            )
