"""Which models are served, and what makes two deployments' KV differ."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lmcache_adapters.hf import Runner, load_model
from lmcache_sdk.errors import ConfigError, UnsupportedError
from tests.hf.tiny import make_model, some_ids, tiny_config, write_config

SMALL: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.MistralConfig(**SMALL, sliding_window=16), "sliding"),
        (transformers.Gemma3TextConfig(**SMALL, head_dim=16), "gemma3.*sliding"),
        (transformers.Qwen3NextConfig(**SMALL), "qwen3_next.*linear"),
        (transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64), "mamba.*state-space"),
        (transformers.T5Config(d_model=32, num_layers=2, vocab_size=64), "t5: encoder-decoder"),
        (
            tiny_config(
                rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
            ),
            "RoPE of type 'dynamic'",
        ),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_a_model_that_is_not_served_is_refused_by_name(tmp_path: Path, config: Any, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        load_model(write_config(tmp_path, config))


def test_latent_attention_is_refused_by_what_it_caches(tmp_path: Path) -> None:
    config = transformers.DeepseekV3Config(
        **SMALL | {"num_key_value_heads": 2},
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=2,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=1,
        first_k_dense_replace=2,
    )
    transformers.DeepseekV3ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="deepseek_v3 caches"):
        load_model(tmp_path)


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "GPT2", "GPTNeoX"])
def test_other_families_of_full_attention_are_served(tmp_path: Path, store_url: str, family: str) -> None:
    torch.manual_seed(0)
    facts = SMALL | {"num_key_value_heads": 1 if family.startswith("Qwen") else SMALL["num_attention_heads"]}
    config = getattr(transformers, f"{family}Config")(
        **facts, max_position_embeddings=256, bos_token_id=1, eos_token_id=0
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    ids = torch.arange(150).remainder(60).add(1).tolist()
    with Runner(tmp_path / "model", store_url) as runner:
        assert runner.model.tokenizer is None
        cold = runner.generate(ids, max_new_tokens=4)
        assert runner.drain()
        warm = runner.generate(ids, max_new_tokens=4)
    assert warm.cached_tokens == 128
    assert warm.token_ids == cold.token_ids


def test_without_a_tokenizer_only_ids_can_be_given(tmp_path: Path) -> None:
    transformers.LlamaForCausalLM(tiny_config()).save_pretrained(tmp_path)
    with Runner(tmp_path) as runner:
        assert runner.generate([1, 2, 3], max_new_tokens=2).text == ""
        with pytest.raises(ConfigError, match="has no tokenizer"):
            runner.generate("Hello")
        with pytest.raises(ConfigError, match="stop strings need a tokenizer"):
            runner.generate([1], stop="x")


@pytest.mark.parametrize(
    ("source", "settings", "message"),
    [
        ("/no/such/model", {}, "no model directory at /no/such/model"),
        ("no-such/model", {}, "'no-such/model' is neither a directory nor a model on the hub"),
        (None, {"dtype": "int3"}, "unknown dtype 'int3'; choose one of: bfloat16"),
        (None, {"device": "abacus"}, "device 'abacus' cannot be used"),
        (None, {"chunk_tokens": 0}, "chunk_tokens must be at least 1, got 0"),
    ],
)
def test_bad_settings_are_named(
    tiny_directory: Path, source: str | None, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_model(source or tiny_directory, **settings)


def test_a_directory_that_is_no_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=str(tmp_path)):
        load_model(tmp_path)


def test_kv_of_another_deployment_is_not_found(tmp_path: Path, tiny_directory: Path, store_url: str) -> None:
    """Other weights under the same path, another dtype, another chunk size: each misses, and finds its own."""
    path = tmp_path / "model"
    shutil.copytree(tiny_directory, path)
    ids = some_ids(200)

    def cached(**settings: Any) -> int:
        with Runner(path, store_url, **settings) as runner:
            tokens = runner.generate(ids, max_new_tokens=1).cached_tokens
            assert runner.drain()
            return tokens

    variants: tuple[dict[str, Any], ...] = ({}, {"dtype": "bfloat16"}, {"chunk_tokens": 32})
    assert [cached(**settings) for settings in variants] == [0, 0, 0]
    assert [cached(**settings) for settings in variants] == [192, 192, 192]

    make_model(path, seed=1)
    assert cached() == 0
    assert cached() == 192
