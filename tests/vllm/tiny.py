"""Tiny models with random weights, made in seconds; vLLM's CPU kernels want heads of 32 and more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 1024
LAYERS, KV_HEADS, DIM = 4, 4, 32
WIDTH = 256
SOUND = 5  # the token that stands where a sound does
_FACTS = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 512,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": WIDTH // DIM,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,  # large enough for attention to matter in random weights
}


def make_model(directory: Path, *, seed: int = 0, **changes: Any) -> Path:
    """A Llama."""
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**{**_FACTS, **changes})).to(torch.bfloat16).save_pretrained(directory)
    _tokenizer().save_pretrained(directory)
    return directory


def make_model_that_hears(directory: Path) -> Path:
    """A Qwen2-Audio with a language model of the same size: a second of sound is 25 tokens."""
    from transformers import (
        Qwen2AudioConfig,
        Qwen2AudioEncoderConfig,
        Qwen2AudioForConditionalGeneration,
        Qwen2AudioProcessor,
        Qwen2Config,
        WhisperFeatureExtractor,
    )

    encoder = Qwen2AudioEncoderConfig(
        num_mel_bins=32,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=128,
        d_model=64,
        initializer_range=0.2,
    )
    config = Qwen2AudioConfig(audio_config=encoder, text_config=Qwen2Config(**_FACTS), audio_token_index=SOUND)
    torch.manual_seed(0)
    Qwen2AudioForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(directory)
    weights = directory / "model.safetensors"  # whose names vLLM knows as they were before transformers 5
    named = {name.replace("model.model.", "model."): tensor for name, tensor in load_file(weights).items()}
    save_file(named, weights, {"format": "pt"})
    extractor = WhisperFeatureExtractor(feature_size=encoder.num_mel_bins, return_attention_mask=True)
    Qwen2AudioProcessor(extractor, _tokenizer()).save_pretrained(directory)
    return directory


def make_model_with_windows(directory: Path) -> Path:
    """A Gemma 3, every other layer of which sees a window only."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    kinds = ["sliding_attention", "full_attention"] * (LAYERS // 2)
    config = Gemma3TextConfig(**_FACTS, head_dim=DIM, query_pre_attn_scalar=DIM, sliding_window=128, layer_types=kinds)
    torch.manual_seed(0)
    Gemma3ForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    _tokenizer().save_pretrained(directory)
    return directory


def make_lora(directory: Path, seed: int) -> Path:
    """An adapter of the Llama's queries and values."""
    random = torch.Generator().manual_seed(seed)
    rank, tensors = 4, {}
    for layer in range(LAYERS):
        for name, width in (("q_proj", WIDTH), ("v_proj", KV_HEADS * DIM)):
            place = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{place}.lora_A.weight"] = torch.randn(rank, WIDTH, generator=random).bfloat16()
            tensors[f"{place}.lora_B.weight"] = 0.2 * torch.randn(width, rank, generator=random).bfloat16()
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    facts = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(facts))
    return directory


def _tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, VOCABULARY)}
    for number, name in enumerate(("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"), SOUND):
        del words[f"w{number}"]
        words[name] = number
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    fast.add_tokens(["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"], special_tokens=True)
    return fast
