"""What a deployment's KV cache is: its groups, cells and namespace, and who computed it.

A *group* is a set of layers whose KV has one shape and one hit rule. A *cell* is the unit of writing: a range of
layers and KV heads of one group for one chunk of tokens; everyone writes whole cells, named by global layer and head.
The *namespace* is the digest of all that makes two deployments' bytes differ; it prefixes every key.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from enum import StrEnum
from functools import cached_property, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from lmcache_sdk.errors import ConfigError, UnsupportedError

SCHEMA_VERSION = 1
DEFAULT_CHUNK_TOKENS = 64

DTYPE_BYTES = {
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "uint8": 1,
}


class GroupKind(StrEnum):
    """What the layers of a group keep of a token."""

    FULL = "full"
    SLIDING = "sliding"
    LATENT = "latent"
    STATE = "state"
    INDEX = "index"
    DRAFT = "draft"


SERVED_KINDS = (GroupKind.FULL, GroupKind.LATENT)
_GROUP_NAME = re.compile(r"[a-z0-9_-]{1,16}")


class Group(msgspec.Struct, frozen=True, dict=True):
    """Layers whose KV has one shape.

    Attributes:
        name: unique in the spec, at most 16 of ``a-z``, ``0-9``, ``_``, ``-``; part of the key.
        kind: ``full`` stores K and V of ``heads x dim``; ``latent`` one row of ``dim`` (``heads`` is 1).
        layers: global layer numbers, ascending.
        heads: KV heads of the whole model (not of a rank).
        dim: elements of a head, or the width of a latent row.
        dtype: a key of :data:`DTYPE_BYTES`.
        hit_rule: ``all`` (every chunk of the prefix is needed). ``trailing:n`` and ``at_boundary`` are reserved.
    """

    name: str
    kind: GroupKind
    layers: tuple[int, ...]
    heads: int
    dim: int
    dtype: str
    hit_rule: str = "all"

    @property
    def roles(self) -> tuple[str, ...]:
        """The planes of one layer, in canonical order."""
        return ("latent",) if self.kind == GroupKind.LATENT else ("k", "v")

    def row_bytes(self, heads: int) -> int:
        """Bytes of one token in one plane, for this many heads."""
        return heads * self.dim * DTYPE_BYTES[self.dtype]


class Cell(msgspec.Struct, frozen=True):
    """A range of layers and heads of one group.

    Attributes:
        layers: global layer numbers, ascending.
        heads: ``(first, end)`` of the global KV heads.
        nbytes: bytes of one chunk of this cell in canonical form, C order ``[layer, role, token, head, dim]``.
    """

    group: str
    layers: tuple[int, ...]
    heads: tuple[int, int]
    nbytes: int

    @property
    def name(self) -> str:
        return f"L{self.layers[0]}-{self.layers[-1] + 1}.H{self.heads[0]}-{self.heads[1]}"


class CellGrid(msgspec.Struct, frozen=True):
    """How chunks are cut into cells; 0 = do not cut. Part of the namespace."""

    layers_per_cell: int = 0
    heads_per_cell: int = 0


class Part(msgspec.Struct, frozen=True):
    """What one rank holds: global layers and heads ``first .. end - 1`` (end 0 = to the last); groups (() = all)."""

    layers: tuple[int, int] = (0, 0)
    heads: tuple[int, int] = (0, 0)
    groups: tuple[str, ...] = ()


WHOLE = Part()


class KVSpec(msgspec.Struct, frozen=True, dict=True):
    """The geometry of a deployment's KV: groups, chunk size, cell grid."""

    groups: tuple[Group, ...]
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS
    grid: CellGrid = CellGrid()

    def validate(self) -> None:
        """Raise for geometry that is not served (UnsupportedError) or makes no sense (ConfigError)."""
        if not self.groups:
            raise ConfigError("a KV spec needs at least one group")
        if self.chunk_tokens < 1:
            raise ConfigError(f"chunk_tokens must be at least 1, got {self.chunk_tokens}")
        if self.grid.layers_per_cell < 0 or self.grid.heads_per_cell < 0:
            raise ConfigError(f"a cell has at least 1 layer and head (0 = do not cut), got {self.grid}")
        if len({group.name for group in self.groups}) != len(self.groups):
            raise ConfigError(f"KV groups need different names, got {', '.join(g.name for g in self.groups)}")
        for group in self.groups:
            if not _GROUP_NAME.fullmatch(group.name):
                raise ConfigError(
                    f"KV group {group.name!r}: a name is 1 to 16 of a-z, 0-9, _ and - (it is part of the key)"
                )
            if group.kind not in SERVED_KINDS:
                raise UnsupportedError(
                    f"KV group {group.name!r} is of kind {group.kind.value!r}; served are: "
                    + ", ".join(kind.value for kind in SERVED_KINDS)
                )
            if group.hit_rule != "all":
                raise UnsupportedError(f"KV group {group.name!r} has hit rule {group.hit_rule!r}; served is 'all'")
            if group.dtype not in DTYPE_BYTES:
                raise UnsupportedError(f"KV dtype {group.dtype!r}; served are: {', '.join(DTYPE_BYTES)}")
            if not group.layers or group.heads < 1 or group.dim < 1:
                raise ConfigError(f"KV group {group.name!r} has no layers, heads or width: {group}")
            if group.layers[0] < 0 or any(a >= b for a, b in pairwise(group.layers)):
                raise ConfigError(f"KV group {group.name!r}: layers must ascend, got {group.layers}")
            if group.kind == GroupKind.LATENT and group.heads != 1:
                raise ConfigError(f"a latent group has one head, {group.name!r} has {group.heads}")

    def group(self, name: str) -> Group:
        for group in self.groups:
            if group.name == name:
                return group
        raise ConfigError(f"no KV group {name!r}; there are: {', '.join(g.name for g in self.groups)}")

    @cached_property
    def cells(self) -> tuple[Cell, ...]:
        """All cells of a chunk, in the order used by tickets and reservations."""
        return tuple(self._cut())

    @cached_property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk, all cells."""
        return sum(cell.nbytes for cell in self.cells)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's KV, all groups."""
        return self.chunk_bytes // self.chunk_tokens

    def _cut(self) -> Iterator[Cell]:
        for group in self.groups:
            layer_step = self.grid.layers_per_cell or len(group.layers)
            head_step = self.grid.heads_per_cell or group.heads
            for at in range(0, len(group.layers), layer_step):
                layers = group.layers[at : at + layer_step]
                for head in range(0, group.heads, head_step):
                    end = min(head + head_step, group.heads)
                    nbytes = len(layers) * len(group.roles) * self.chunk_tokens * group.row_bytes(end - head)
                    yield Cell(group.name, layers, (head, end), nbytes)

    def cells_of(self, part: Part) -> tuple[int, ...]:
        """The indices of the cells that ``part`` holds.

        Raises:
            ConfigError: the part cuts a cell in two; a finer grid is needed.
        """
        chosen = []
        for index, cell in enumerate(self.cells):
            if part.groups and cell.group not in part.groups:
                continue
            group = self.group(cell.group)
            first_layer, end_layer = part.layers[0], part.layers[1] or group.layers[-1] + 1
            first_head, end_head = part.heads[0], part.heads[1] or group.heads
            inside = [first_layer <= layer < end_layer for layer in cell.layers]
            overlap = max(0, min(cell.heads[1], end_head) - max(cell.heads[0], first_head))
            if not any(inside) or overlap == 0:
                continue
            if not all(inside) or overlap < cell.heads[1] - cell.heads[0]:
                raise ConfigError(
                    f"this rank holds layers {first_layer}-{end_layer - 1} and heads {first_head}-{end_head - 1}, "
                    f"which cuts cell {cell.name}; set layers_per_cell / heads_per_cell to divide the rank's shard"
                )
            chosen.append(index)
        return tuple(chosen)


def canonical_json(value: Any) -> bytes:
    """The one text of a value, for digests: sorted keys, no spaces, ASCII (``docs/key-format.md``)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


class Namespace(msgspec.Struct, frozen=True, dict=True):
    """What is constant for a deployment. Two deployments share chunks only if all of it is equal.

    Attributes:
        fingerprint: of the weights, see :func:`weights_fingerprint`.
        spec: groups, chunk size, cell grid, KV dtype.
        rope: the facts that change K after rotation (theta, scaling, partial rotary, maximum positions if scaled).
        quantization: facts of KV quantization, empty if there is none.
        form: ``canonical``, or ``native:<tag>`` where an engine's own bytes are kept unconverted.
        epoch: raised when the weights are replaced in a running engine.
        label, source: the model's name and directory, for people. Not part of the identity.
    """

    fingerprint: str
    spec: KVSpec
    rope: str = ""
    quantization: str = ""
    form: str = "canonical"
    epoch: int = 0
    label: str = ""
    source: str = ""

    @cached_property
    def id(self) -> str:
        """32 hex digits: the first half of SHA-256 over canonical JSON (``docs/key-format.md``)."""
        facts = msgspec.to_builtins(self)
        del facts["label"], facts["source"]
        facts["schema"] = SCHEMA_VERSION
        return hashlib.sha256(canonical_json(facts)).hexdigest()[:32]


class Producer(msgspec.Struct, frozen=True, dict=True):
    """Who computed the KV: another producer's is the same in meaning, not in bytes.

    Attributes:
        engine: ``hf``, ``vllm``, ``sglang``.
        version: of the engine and of what decides its arithmetic (attention implementation …).
        device: ``cpu``, ``cuda``, ``rocm``, ``npu``.
    """

    engine: str
    version: str
    device: str

    @property
    def name(self) -> str:
        return f"{self.engine}-{self.version}-{self.device}"

    @cached_property
    def id(self) -> str:
        """16 hex digits."""
        text = canonical_json([self.engine, self.version, self.device])
        return hashlib.sha256(text).hexdigest()[:16]


class Share(StrEnum):
    """Whose chunks an engine loads beside its own producer's: those of producers whose KV was compared with its own and
    agreed; those of all producers of the namespace; nobody's.
    """

    VERIFIED = "verified"
    ANY = "any"
    OWN = "own"

    @classmethod
    def of(cls, text: str) -> Share:
        """Raises ConfigError for another word."""
        try:
            return cls(text)
        except ValueError:
            raise ConfigError(f"share is {text!r}; it is one of: {', '.join(cls)}") from None


# What an HF config says about layers that are not full attention, by key. A model that has one of these is refused
# unless a test shows that it works.
_HYBRID_KEYS = {
    "mamba_d_state": "state-space layers",
    "state_size": "state-space layers",
    "ssm_cfg": "state-space layers",
    "ssm_state_size": "state-space layers",
    "linear_num_key_heads": "linear-attention layers",
    "attention_chunk_size": "chunked attention",
    "attn_layer_period": "hybrid layers",
    "layers_block_type": "hybrid layers",
    "hybrid_override_pattern": "hybrid layers",
    "block_types": "hybrid layers",
    "cross_attention_layers": "cross-attention layers",
}
_ROPE_KEYS = ("rope_theta", "partial_rotary_factor", "position_embedding_type")
_OLD_ROPE_KEYS = {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor", "type": "rope_type"}


def refuse_unserved(config: Mapping[str, Any]) -> None:
    """Raise :class:`UnsupportedError` for a model (its HF ``config.json``) whose layers are not all full attention."""
    if config.get("text_config"):
        refuse_unserved(config["text_config"])
    model = config.get("model_type", "this model")
    if config.get("is_encoder_decoder"):
        raise UnsupportedError(f"{model}: encoder-decoder models are not served")
    for key, meaning in _HYBRID_KEYS.items():
        if config.get(key):
            raise UnsupportedError(f"{model} has {meaning} ({key}={config[key]!r}); only full attention is served")
    kinds = sorted(set(config.get("layer_types") or ()) - {"full_attention"})
    if kinds:
        raise UnsupportedError(f"{model} has layers of type {', '.join(kinds)}; only full_attention is served")
    if not config.get("layer_types") and config.get("sliding_window") and config.get("use_sliding_window", True):
        raise UnsupportedError(
            f"{model} has sliding-window attention (sliding_window={config['sliding_window']}); "
            "only full attention is served"
        )


def namespace_of(
    config: Mapping[str, Any],
    *,
    fingerprint: str,
    dtype: str,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    grid: CellGrid | None = None,
    quantization: str = "",
    form: str = "canonical",
    epoch: int = 0,
    label: str = "",
    source: str = "",
) -> Namespace:
    """The namespace of a model, from its HF ``config.json``; all adapters use this one function.

    Args:
        config: the model's configuration with its defaults filled in, or one that holds it as ``text_config``.
        dtype: of the KV cache, which need not be the weights'.

    Raises:
        UnsupportedError: a layer kind or dtype that is not served, by name.
        ConfigError: the config lacks a number that is needed.
    """
    refuse_unserved(config)
    config = config.get("text_config") or config

    def number(*names: str) -> int:
        for name in names:
            if config.get(name):
                return int(config[name])
        raise ConfigError(f"the model's config has none of: {', '.join(names)}")

    layers = tuple(range(number("num_hidden_layers", "n_layer", "num_layers")))
    if config.get("kv_lora_rank"):
        width = number("kv_lora_rank") + int(config.get("qk_rope_head_dim") or 0)
        group = Group("latent", GroupKind.LATENT, layers, 1, width, dtype)
    else:
        query_heads = number("num_attention_heads", "n_head")
        heads = int(config.get("num_key_value_heads") or query_heads)
        dim = int(config.get("head_dim") or number("hidden_size", "n_embd") // query_heads)
        group = Group("full", GroupKind.FULL, layers, heads, dim, dtype)
    spec = KVSpec((group,), chunk_tokens, grid or CellGrid())
    spec.validate()
    return Namespace(
        fingerprint=fingerprint,
        spec=spec,
        rope=canonical_json(rope_facts(config)).decode(),
        quantization=quantization,
        form=form,
        epoch=epoch,
        label=label,
        source=source,
    )


def rope_facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the rotation of K, in one spelling for the two that configs have.

    Newer configs hold all of it in ``rope_parameters``, older ones in ``rope_theta`` and ``rope_scaling``: one
    model must not become two namespaces when an engine moves to a newer Transformers.
    """
    facts = {key: config.get(key) for key in (*_ROPE_KEYS, *_OLD_ROPE_KEYS) if key != "type"}
    facts |= {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    for old, new in _OLD_ROPE_KEYS.items():
        value = facts.pop(old, None)
        if facts.get(new) is None:
            facts[new] = value
    if facts["rope_type"] in (None, "default"):
        facts["rope_type"] = None
    else:  # only scaled RoPE depends on it; a plain model may be served with any context length
        facts["max_position_embeddings"] = config.get("max_position_embeddings")
    return {
        key: float(value) if isinstance(value, int) and not isinstance(value, bool) else value
        for key, value in facts.items()
        if value is not None
    }


# Config entries that do not change what the weights compute.
_CONFIG_NOISE = (
    "_name_or_path",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "use_cache",
    "architectures",
)
_SAMPLE_BYTES = 256
_SAMPLES = 16  # of each tensor
_HEADER_LIMIT = 100 << 20


def weights_fingerprint(directory: str | os.PathLike[str]) -> str:
    """32 hex digits that name a model's weights, whatever the directory is called.

    Covers config.json (less what does not change the computation), each weight file's size, the safetensors headers,
    and 16 times 256 bytes of every tensor, evenly spread: under a second for the largest models, since nothing
    is read whole. Two checkpoints that differ only between the samples would not be told apart. Repeated calls are
    answered from memory while inode, size and modification time of all files stay the same.

    Raises:
        ConfigError: the directory has no config.json or no weight files, or one of these cannot be read.
    """
    root = Path(directory)
    config = root / "config.json"
    if not config.is_file():
        raise ConfigError(f"{root} is not a model directory: it has no config.json")
    files = sorted(root.glob("*.safetensors")) or sorted(root.glob("*.bin")) or sorted(root.glob("*.gguf"))
    if not files:
        raise ConfigError(f"{root} has no weights (*.safetensors, *.bin or *.gguf)")
    stats = [(str(file), file.stat()) for file in (config, *files)]
    return _fingerprint(tuple((name, s.st_ino, s.st_size, s.st_mtime_ns) for name, s in stats))


@lru_cache(maxsize=64)
def _fingerprint(files: tuple[tuple[str, int, int, int], ...]) -> str:
    facts = _json_object(Path(files[0][0]).read_bytes(), files[0][0])
    for noise in _CONFIG_NOISE:
        facts.pop(noise, None)
    sha = hashlib.sha256(b"lmcache-sdk-weights-v1\0")
    sha.update(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode())  # NaN occurs in configs
    for name, _, size, _ in files[1:]:
        sha.update(f"\0{Path(name).name}\0{size}\0".encode())
        with Path(name).open("rb") as file:
            for start, length in _sample_places(file.fileno(), name, size):
                sha.update(os.pread(file.fileno(), length, start))
    return sha.hexdigest()[:32]


def _json_object(text: bytes, what: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{what} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{what} is not a JSON object, it is a {type(found).__name__}")
    return found


def _sample_places(fd: int, name: str, size: int) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) of what is hashed of one weight file."""
    spans = [(size * i // 64, size * (i + 1) // 64) for i in range(64)]
    if name.endswith(".safetensors"):
        header = int.from_bytes(os.pread(fd, 8, 0), "little")
        if not 2 <= header <= min(size - 8, _HEADER_LIMIT):
            raise ConfigError(f"{name} is not a whole safetensors file: its header length is {header}")
        yield 0, 8 + header
        tensors = _json_object(os.pread(fd, header, 8), f"the header of {name}")
        tensors.pop("__metadata__", None)
        try:
            offsets = [tensor["data_offsets"] for tensor in tensors.values()]
            spans = [(8 + header + first, 8 + header + end) for first, end in offsets]
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{name} is not a safetensors file: {error!r} in its header") from error
        if any(not 8 + header <= first <= end <= size for first, end in spans):
            raise ConfigError(f"{name} is cut off: its header names bytes beyond its {size}")
    for start, end in spans:
        last = max(start, end - _SAMPLE_BYTES)
        for part in range(_SAMPLES):
            at = start + (last - start) * part // (_SAMPLES - 1)
            yield at, min(_SAMPLE_BYTES, end - at)
