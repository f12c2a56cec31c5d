"""Geometry and identity: what configs of real models come to, how chunks are cut, and what changes a name."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lmcache_sdk import spec as spec_module
from lmcache_sdk.errors import ConfigError, UnsupportedError
from lmcache_sdk.spec import (
    DTYPE_BYTES,
    WHOLE,
    Cell,
    CellGrid,
    Group,
    GroupKind,
    KVSpec,
    Namespace,
    Part,
    Producer,
    namespace_of,
    refuse_unserved,
    weights_fingerprint,
)

# What config.json of published models says, less what is of no interest here.
LLAMA = {
    "model_type": "llama", "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "hidden_size": 4096, "head_dim": 128, "rope_theta": 500000.0, "max_position_embeddings": 131072,
    "rope_scaling": {
        "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}  # fmt: skip
QWEN2 = {
    "model_type": "qwen2", "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
    "hidden_size": 3584, "rope_theta": 1000000.0, "sliding_window": 131072, "use_sliding_window": False,
    "max_window_layers": 28, "max_position_embeddings": 32768,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024}
DEEPSEEK = {
    "model_type": "deepseek_v3", "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128,
    "hidden_size": 7168, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
    "rope_theta": 10000, "rope_scaling": {"type": "yarn", "factor": 40}, "max_position_embeddings": 163840,
}  # fmt: skip
MISTRAL = {
    "model_type": "mistral", "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "hidden_size": 4096, "sliding_window": 4096, "rope_theta": 10000.0,
}  # fmt: skip
GEMMA3 = {
    "model_type": "gemma3",
    "text_config": {
        "model_type": "gemma3_text", "num_hidden_layers": 34, "num_attention_heads": 8, "num_key_value_heads": 4,
        "hidden_size": 2560, "head_dim": 256, "sliding_window": 1024,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
    },
}  # fmt: skip
VISION = {"model_type": "qwen2_vl", "vision_config": {"depth": 32}, "text_config": QWEN2}


def space(config: dict[str, Any], **arguments: Any) -> Namespace:
    return namespace_of(config, **{"fingerprint": "f" * 32, "dtype": "bfloat16"} | arguments)


def group(**changes: Any) -> Group:
    return Group(**{
        "name": "full", "kind": GroupKind.FULL, "layers": (0, 1, 2, 3), "heads": 4, "dim": 8, "dtype": "bfloat16"
    } | changes)  # fmt: skip


# Configs of real models


@pytest.mark.parametrize(
    ("config", "kind", "layers", "heads", "dim", "token_bytes"),
    [
        (LLAMA, "full", 32, 8, 128, 131072),
        (QWEN2, "full", 28, 4, 128, 57344),
        (GPT2, "full", 12, 12, 64, 36864),
        (MISTRAL | {"sliding_window": None}, "full", 32, 8, 128, 131072),
        (DEEPSEEK, "latent", 61, 1, 576, 70272),
        (VISION, "full", 28, 4, 128, 57344),
    ],
    ids=["llama", "qwen2", "gpt2", "mistral", "deepseek", "vision"],
)
def test_what_a_config_comes_to(
    config: dict[str, Any], kind: str, layers: int, heads: int, dim: int, token_bytes: int
) -> None:
    spec = space(config).spec
    (only,) = spec.groups
    assert (only.name, only.kind, only.layers) == (kind, kind, tuple(range(layers)))
    assert (only.heads, only.dim, only.dtype) == (heads, dim, "bfloat16")
    assert (spec.token_bytes, spec.chunk_bytes) == (token_bytes, 64 * token_bytes)
    spec.validate()


def test_a_nested_config_is_the_same_as_its_text_model() -> None:
    assert space(VISION).id == space(QWEN2).id


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MISTRAL, r"mistral has sliding-window attention \(sliding_window=4096\)"),
        (QWEN2 | {"use_sliding_window": True}, "qwen2 has sliding-window"),
        (GEMMA3, "gemma3_text has layers of type sliding_attention"),
        (LLAMA | {"layer_types": ["full_attention", "linear_attention"]}, "of type linear_attention"),
        ({"model_type": "mamba", "state_size": 16, "num_hidden_layers": 24}, r"mamba has state-space layers"),
        ({"model_type": "jamba", "mamba_d_state": 16}, "jamba has state-space"),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "M-M*"}, "nemotron_h has hybrid layers"),
        ({"model_type": "nemotron_h", "ssm_state_size": 128}, "nemotron_h has state-space"),
        ({"model_type": "recurrent_gemma", "block_types": ["recurrent"]}, "recurrent_gemma has hybrid"),
        ({"model_type": "qwen3_next", "linear_num_key_heads": 16}, "linear-attention"),
        ({"model_type": "llama4_text", "attention_chunk_size": 8192}, "chunked attention"),
        ({"model_type": "mllama_text_model", "cross_attention_layers": [3]}, "cross-attention"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "t5: encoder-decoder"),
        ({"model_type": "outer", "is_encoder_decoder": True, "text_config": LLAMA}, "outer: encoder-decoder"),
        ({"model_type": "outer", "text_config": {"model_type": "mamba", "state_size": 16}}, "mamba has state-space"),
    ],
)
def test_what_is_not_full_attention_is_refused_by_name(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        space(config)
    with pytest.raises(UnsupportedError, match=message):
        refuse_unserved(config)


def test_layer_types_of_full_attention_outvote_an_unused_window() -> None:
    space(MISTRAL | {"layer_types": ["full_attention"] * 32})


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("num_hidden_layers", "num_hidden_layers, n_layer, num_layers"),
        ("num_attention_heads", "num_attention_heads, n_head"),
        ("hidden_size", "hidden_size, n_embd"),
    ],
)
def test_a_number_that_is_missing_is_named(missing: str, message: str) -> None:
    config = {key: value for key, value in QWEN2.items() if key != missing}
    with pytest.raises(ConfigError, match=f"none of: {message}"):
        space(config)


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="'int4'; served are: bfloat16"):
        space(LLAMA, dtype="int4")


# RoPE

OLD_SCALING = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"rope_theta": 10000}, {"rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}),
        ({"rope_theta": 1e6, "rope_scaling": None}, {"rope_theta": 1e6}),
        (
            {"rope_theta": 1e6, "rope_scaling": OLD_SCALING},
            {
                "rope_parameters": {
                    "rope_theta": 1e6, "rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 32768
                }
            },
        ),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2}},
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}},
        ),
        (
            {"rotary_emb_base": 10000, "rotary_pct": 0.25},
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25, "rope_type": "default"}},
        ),
        ({"rope_theta": 1e4, "partial_rotary_factor": 0.5}, {
            "partial_rotary_factor": 0.5, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}
        }),
    ],
    ids=["plain", "null", "yarn", "linear", "neox", "partial"],
)  # fmt: skip
def test_both_spellings_of_rope_are_one_namespace(old: dict[str, Any], new: dict[str, Any]) -> None:
    assert space(QWEN2 | {"rope_theta": None} | old).id == space(QWEN2 | {"rope_theta": None} | new).id


def test_another_rope_is_another_namespace() -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"rope_theta": 1e6 + 1},
        {"rope_scaling": OLD_SCALING},
        {"rope_scaling": OLD_SCALING | {"factor": 2.0}},
        {"rope_scaling": OLD_SCALING, "max_position_embeddings": 1000},
        {"rope_scaling": OLD_SCALING | {"type": "linear"}},
        {"partial_rotary_factor": 0.5},
        {"position_embedding_type": "alibi"},
    ]
    assert len({space(QWEN2 | change).id for change in changes}) == len(changes)


def test_context_length_counts_only_where_rope_is_scaled() -> None:
    longer = {"max_position_embeddings": 65536}
    assert space(QWEN2).id == space(QWEN2 | longer).id
    assert space(LLAMA).id != space(LLAMA | longer).id


# Geometry

geometries = st.builds(
    KVSpec,
    groups=st.tuples(
        st.builds(
            group,
            layers=st.lists(st.integers(0, 40), min_size=1, max_size=12, unique=True).map(
                lambda found: tuple(sorted(found))
            ),
            heads=st.integers(1, 9),
            dim=st.integers(1, 5),
            dtype=st.sampled_from(sorted(DTYPE_BYTES)),
        )
    )
    | st.tuples(
        st.builds(group, heads=st.integers(1, 3)),
        st.builds(group, name=st.just("latent"), kind=st.just(GroupKind.LATENT), heads=st.just(1)),
    ),
    chunk_tokens=st.integers(1, 5),
    grid=st.builds(CellGrid, st.integers(0, 5), st.integers(0, 5)),
)


@given(geometries)
def test_cells_cover_every_layer_and_head_once(spec: KVSpec) -> None:
    spec.validate()
    for described in spec.groups:
        covered = [
            (layer, head)
            for cell in spec.cells
            if cell.group == described.name
            for layer in cell.layers
            for head in range(*cell.heads)
        ]
        assert sorted(covered) == [(layer, head) for layer in described.layers for head in range(described.heads)]
    for cell in spec.cells:
        described = spec.group(cell.group)
        shape = (
            len(cell.layers),
            len(described.roles),
            spec.chunk_tokens,
            cell.heads[1] - cell.heads[0],
            described.dim,
        )
        assert cell.nbytes == np.prod(shape) * DTYPE_BYTES[described.dtype]
        assert len(cell.name) <= 32
    assert len({(cell.group, cell.name) for cell in spec.cells}) == len(spec.cells), "no two cells share a key"
    assert spec.chunk_bytes == sum(cell.nbytes for cell in spec.cells) == spec.token_bytes * spec.chunk_tokens


@given(geometries, st.data())
def test_parts_that_cut_no_cell_share_them_out(spec: KVSpec, data: st.DataObject) -> None:
    assume(len(spec.groups) == 1)
    (described,) = spec.groups
    cell_heads = spec.grid.heads_per_cell or described.heads
    edges = {0, described.heads, *range(0, described.heads, data.draw(st.integers(1, 3)) * cell_heads)}
    cuts = sorted(edges)
    parts = [Part(heads=(first, end)) for first, end in pairwise(cuts)]
    found = [cell for part in parts for cell in spec.cells_of(part)]
    assert sorted(found) == list(range(len(spec.cells)))


def test_a_part_names_its_cells() -> None:
    spec = KVSpec((group(),), 2, CellGrid(layers_per_cell=2, heads_per_cell=2))
    assert [cell.name for cell in spec.cells] == ["L0-2.H0-2", "L0-2.H2-4", "L2-4.H0-2", "L2-4.H2-4"]
    assert spec.cells_of(WHOLE) == (0, 1, 2, 3)
    assert spec.cells_of(Part(heads=(0, 2))) == (0, 2)
    assert spec.cells_of(Part(layers=(2, 0))) == (2, 3)
    assert spec.cells_of(Part(layers=(0, 2), heads=(2, 4))) == (1,)
    assert spec.cells_of(Part(groups=("full",))) == (0, 1, 2, 3)
    assert spec.cells_of(Part(groups=("latent",))) == spec.cells_of(Part(layers=(9, 12))) == ()


@pytest.mark.parametrize("part", [Part(heads=(0, 1)), Part(heads=(1, 3)), Part(layers=(0, 1)), Part(layers=(1, 4))])
def test_a_part_that_cuts_a_cell_is_refused_with_the_fix(part: Part) -> None:
    spec = KVSpec((group(),), 2, CellGrid(layers_per_cell=2, heads_per_cell=2))
    with pytest.raises(ConfigError, match="set layers_per_cell / heads_per_cell"):
        spec.cells_of(part)


def test_a_cell_is_named_by_global_layers() -> None:
    spec = KVSpec((group(layers=(5, 11, 17)),), 1)
    assert spec.cells == (Cell("full", (5, 11, 17), (0, 4), 3 * 2 * 4 * 8 * 2),)
    assert spec.cells[0].name == "L5-18.H0-4"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (KVSpec(()), "at least one group"),
        (KVSpec((group(),), 0), "chunk_tokens must be at least 1, got 0"),
        (KVSpec((group(),), grid=CellGrid(layers_per_cell=-1)), "layers_per_cell=-1"),
        (KVSpec((group(),), grid=CellGrid(heads_per_cell=-2)), "heads_per_cell=-2"),
        (KVSpec((group(), group())), "different names"),
        (KVSpec((group(name="a/b"),)), "'a/b'"),
        (KVSpec((group(name=""),)), "''"),
        (KVSpec((group(name="seventeen-letters"),)), "'seventeen-letters'"),
        (KVSpec((group(layers=()),)), "no layers, heads or width"),
        (KVSpec((group(heads=0),)), "no layers, heads or width"),
        (KVSpec((group(dim=-1),)), "no layers, heads or width"),
        (KVSpec((group(layers=(1, 0)),)), "must ascend"),
        (KVSpec((group(layers=(0, 0)),)), "must ascend"),
        (KVSpec((group(layers=(-1, 0)),)), "must ascend"),
        (KVSpec((group(kind=GroupKind.LATENT, heads=2),)), "one head"),
    ],
)
def test_geometry_that_cannot_be_is_refused(spec: KVSpec, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        spec.validate()


@pytest.mark.parametrize("kind", [kind for kind in GroupKind if kind not in spec_module.SERVED_KINDS])
def test_a_kind_that_is_not_served_is_refused_by_name(kind: GroupKind) -> None:
    with pytest.raises(UnsupportedError, match=f"of kind '{kind.value}'; served are: full, latent"):
        KVSpec((group(kind=kind),)).validate()


def test_a_hit_rule_that_is_not_served_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="'trailing:2'"):
        KVSpec((group(hit_rule="trailing:2"),)).validate()


def test_an_unknown_group_is_named() -> None:
    with pytest.raises(ConfigError, match="no KV group 'x'; there are: full"):
        KVSpec((group(),)).group("x")


# Names

BASE = space(LLAMA, label="a", source="/a")


def test_ids_are_stable() -> None:
    """A change here changes every key: raise SCHEMA_VERSION and write it into docs/key-format.md."""
    assert BASE.id == "1cdcde24130a3bada760983cebec25c6"
    assert space(DEEPSEEK, chunk_tokens=256, grid=CellGrid(1, 0)).id == "19025d9d59bf78e8651b5024b2900a56"
    assert Producer("vllm", "0.11.0", "cuda").id == "f5afc0169a8f6397"


def test_the_id_is_a_digest_of_canonical_json() -> None:
    text = json.dumps(
        {
            "schema": 1,
            "fingerprint": "f" * 32,
            "rope": BASE.rope,
            "quantization": "",
            "form": "canonical",
            "epoch": 0,
            "spec": {
                "chunk_tokens": 64,
                "grid": {"layers_per_cell": 0, "heads_per_cell": 0},
                "groups": [
                    {
                        "name": "full", "kind": "full", "layers": list(range(32)), "heads": 8, "dim": 128,
                        "dtype": "bfloat16", "hit_rule": "all",
                    }
                ],
            },
        },
        sort_keys=True,
        separators=(",", ":"),
    )  # fmt: skip
    assert BASE.id == hashlib.sha256(text.encode()).hexdigest()[:32]


def test_labels_are_not_identity() -> None:
    assert space(LLAMA, label="b", source="/b").id == BASE.id


@pytest.mark.parametrize(
    "changes",
    [
        {"fingerprint": "e" * 32},
        {"dtype": "float16"},
        {"chunk_tokens": 16},
        {"grid": CellGrid(layers_per_cell=1)},
        {"grid": CellGrid(heads_per_cell=1)},
        {"quantization": "fp8-per-head"},
        {"form": "native:x"},
        {"epoch": 1},
    ],
    ids=str,
)
def test_every_fact_is_identity(changes: dict[str, Any]) -> None:
    assert space(LLAMA, **changes).id != BASE.id


def test_another_schema_is_another_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec_module, "SCHEMA_VERSION", spec_module.SCHEMA_VERSION + 1)
    assert space(LLAMA).id != BASE.id


def test_a_manifest_gives_the_same_id_back() -> None:
    found = msgspec.json.decode(msgspec.json.encode(BASE), type=Namespace)
    assert found == BASE and found.id == BASE.id
    producer = Producer("hf", "5", "cpu")
    assert msgspec.json.decode(msgspec.json.encode(producer), type=Producer).id == producer.id


def test_producers_are_apart() -> None:
    producers = [
        Producer("hf", "5", "cpu"), Producer("vllm", "5", "cpu"), Producer("hf", "6", "cpu"),
        Producer("hf", "5", "cuda"), Producer("hf-5", "", "cpu"), Producer("hf", "5-cpu", ""),
    ]  # fmt: skip
    assert len({producer.id for producer in producers}) == len(producers)
    assert all(len(producer.id) == 16 for producer in producers)


# Fingerprints of weights


def safetensors(tensors: dict[str, np.ndarray[Any, Any]], metadata: dict[str, str] | None = None) -> bytes:
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name, tensor in tensors.items():
        offsets = [len(data), len(data) + tensor.nbytes]
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": offsets}
        data += tensor.tobytes()
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensors() -> dict[str, np.ndarray[Any, Any]]:
    random = np.random.default_rng(0)
    return {name: random.standard_normal((64, 64), np.float32) for name in ("embed", "layer.0", "layer.1", "head")}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(LLAMA))
    (directory / "model.safetensors").write_bytes(safetensors(tensors()))
    (directory / "tokenizer.json").write_text("{}")
    return directory


def rewrite(change: Callable[[dict[str, np.ndarray[Any, Any]]], None]) -> Callable[[Path], None]:
    def apply(model: Path) -> None:
        changed = tensors()
        change(changed)
        (model / "model.safetensors").write_bytes(safetensors(changed))

    return apply


def set_value(name: str, at: int) -> Callable[[Path], None]:
    def change(found: dict[str, np.ndarray[Any, Any]]) -> None:
        found[name].reshape(-1)[at] += 1

    return rewrite(change)


def set_config(**changes: Any) -> Callable[[Path], None]:
    return lambda model: (model / "config.json").write_text(json.dumps(LLAMA | changes)) and None


@pytest.mark.parametrize(
    "change",
    [
        set_value("embed", 0),
        set_value("layer.1", (64 * 64 * 4 - 256) * 8 // 15 // 4 + 9),  # in the ninth of 16 samples
        set_value("head", -1),
        rewrite(lambda found: found.update(embed=found["embed"].T.copy())),
        rewrite(lambda found: found.update(extra=np.zeros(4, np.float32))),
        rewrite(lambda found: found.pop("head") is None),
        set_config(rope_theta=1.0),
        set_config(num_experts_per_tok=3),
        lambda model: (model / "more.safetensors").write_bytes(safetensors({})) and None,
        lambda model: (model / "model.safetensors").write_bytes(safetensors(tensors(), {"format": "other"})) and None,
    ],
    ids=["first", "middle", "last", "transposed", "added", "removed", "rope", "config", "another file", "metadata"],
)
def test_what_changes_the_model_changes_the_fingerprint(model: Path, change: Callable[[Path], None]) -> None:
    before = weights_fingerprint(model)
    assert len(before) == 32 and int(before, 16)
    change(model)
    assert weights_fingerprint(model) != before


@pytest.mark.parametrize(
    "change",
    [
        lambda model: os.utime(model / "model.safetensors", (0, 0)),
        lambda model: (model / "README.md").write_text("a model") and None,
        lambda model: (model / "tokenizer.json").write_text('{"a": 1}') and None,
        lambda model: (model / "config.json").write_text(json.dumps(LLAMA, indent=4, sort_keys=True)) and None,
        set_config(_name_or_path="somewhere", transformers_version="9", torch_dtype="float16", use_cache=False),
    ],
    ids=["time", "readme", "tokenizer", "formatting", "noise"],
)
def test_what_does_not_change_the_model_does_not_change_the_fingerprint(
    model: Path, change: Callable[[Path], None]
) -> None:
    before = weights_fingerprint(model)
    change(model)
    assert weights_fingerprint(model) == before


def test_a_copy_under_another_name_is_the_same_model(model: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "renamed"
    shutil.copytree(model, other)
    linked = tmp_path / "linked"
    linked.symlink_to(model)
    assert weights_fingerprint(other) == weights_fingerprint(str(linked)) == weights_fingerprint(model)


def test_a_model_that_is_replaced_under_the_same_path_is_seen(model: Path) -> None:
    """Same size, and even the same time: the inode tells."""
    before = weights_fingerprint(model)
    file = model / "model.safetensors"
    stat = file.stat()
    new = model / "new"
    new.write_bytes(file.read_bytes())
    with new.open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        opened.write(b"\x7f")
    os.utime(new, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    new.replace(file)
    assert weights_fingerprint(model) != before


def test_repeated_calls_read_nothing(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = weights_fingerprint(model)
    monkeypatch.setattr(os, "pread", lambda *_: pytest.fail("read again"))
    assert weights_fingerprint(model) == before


@pytest.mark.parametrize("suffix", [".bin", ".gguf"])
def test_other_weight_files_are_sampled(model: Path, suffix: str) -> None:
    (model / "model.safetensors").unlink()
    file = model / f"weights{suffix}"
    content = bytearray(np.random.default_rng(0).bytes(200_000))
    file.write_bytes(content)
    found = {weights_fingerprint(model)}
    for at in (0, len(content) // 2, -1):
        changed = bytearray(content)
        changed[at] ^= 1
        file.write_bytes(changed)
        found.add(weights_fingerprint(model))
    assert len(found) == 4


def test_the_fingerprint_is_that_of_the_specification(tmp_path: Path) -> None:
    """Step by step as docs/key-format.md has it."""
    (tmp_path / "config.json").write_text('{"z": 1, "a": "ü", "use_cache": true}', encoding="utf-8")
    long, short = np.arange(300, dtype=np.float32), np.arange(3, dtype=np.float32)
    content = safetensors({"long": long, "short": short})
    (tmp_path / "m.safetensors").write_bytes(content)
    header = struct.unpack("<Q", content[:8])[0] + 8
    message = b'lmcache-sdk-weights-v1\0{"a":"\\u00fc","z":1}\0m.safetensors\0%d\0' % len(content)
    message += content[:header]
    for tensor in (long.tobytes(), short.tobytes()):
        starts = [(len(tensor) - 256) * part // 15 for part in range(16)]
        message += b"".join(tensor[at : at + 256] for at in starts)
    assert weights_fingerprint(tmp_path) == hashlib.sha256(message).hexdigest()[:32]


def corrupt(data: bytes) -> Callable[[Path], object]:
    return lambda model: (model / "model.safetensors").write_bytes(data)


WHOLE_FILE = safetensors(tensors())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: (model / "config.json").unlink(), "no config.json"),
        (lambda model: (model / "model.safetensors").unlink(), "no weights"),
        (lambda model: (model / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda model: (model / "config.json").write_bytes(b"\xff\xfe"), "config.json is not JSON"),
        (lambda model: (model / "config.json").write_text("[]"), "not a JSON object, it is a list"),
        (corrupt(b""), "not a whole safetensors file: its header length is 0"),
        (corrupt(WHOLE_FILE[:7]), "not a whole safetensors file"),
        (corrupt(WHOLE_FILE[:8]), "not a whole safetensors file"),
        (corrupt(WHOLE_FILE[:100]), "not a whole safetensors file"),
        (corrupt(WHOLE_FILE[:-1]), "is cut off"),
        (corrupt(struct.pack("<Q", 2**63) + WHOLE_FILE[8:]), "9223372036854775808"),
        (corrupt(struct.pack("<Q", 4) + b"nope"), "the header of .* is not JSON"),
        (corrupt(struct.pack("<Q", 2) + b"[]"), "it is a list"),
        (corrupt(struct.pack("<Q", 8) + b'{"a": 1}'), "not a safetensors file"),
        (corrupt(struct.pack("<Q", 9) + b'{"a": {}}'), "KeyError"),
        (corrupt(struct.pack("<Q", 33) + b'{"a": {"data_offsets": ["x", 3]}}'), "not a safetensors file"),
        (corrupt(struct.pack("<Q", 31) + b'{"a": {"data_offsets": [0, 9]}}'), "is cut off"),
        (corrupt(struct.pack("<Q", 32) + b'{"a": {"data_offsets": [-9, 0]}}'), "is cut off"),
    ],
)
def test_a_broken_model_directory_is_refused_by_name(
    model: Path, change: Callable[[Path], object], message: str
) -> None:
    change(model)
    with pytest.raises(ConfigError, match=message) as caught:
        weights_fingerprint(model)
    assert str(model) in str(caught.value)


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere is not a model directory"):
        weights_fingerprint(tmp_path / "nowhere")


def test_a_model_of_many_gigabytes_takes_less_than_a_second(tmp_path: Path) -> None:
    """16 GB in four files of 75 tensors each; holes of a sparse file read as zeros."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    size = 16 * 10**9 // 300
    for number in range(4):
        header = {
            f"layers.{number}.{at}": {
                "dtype": "BF16",
                "shape": [size // 2],
                "data_offsets": [at * size, (at + 1) * size],
            }
            for at in range(75)
        }
        text = json.dumps(header).encode()
        with (tmp_path / f"model-{number}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + 75 * size)
    started = time.perf_counter()
    weights_fingerprint(tmp_path)
    assert time.perf_counter() - started < 1
