"""transformers' own model classes at tiny sizes; the weights are random, the code is the real one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.models.case import Inputs, ModelCase

VOCAB, HIDDEN, HEAD_DIM, HEADS, KV_HEADS, FEED_FORWARD, LAYERS = 61, 40, 6, 8, 4, 52, 2
WIDTH = HEADS * HEAD_DIM  # the hidden size of models whose head size is hidden // heads
SPECIAL = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)

# Each entry: the names of the config class and the model class, and the config's arguments.
# kv_heads is a variant of the models with grouped queries.
CAUSAL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", dict(head_dim=HEAD_DIM)),
    "mistral": ("MistralConfig", "MistralForCausalLM", dict(head_dim=HEAD_DIM, sliding_window=4)),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", dict(hidden_size=WIDTH)),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", dict(head_dim=HEAD_DIM)),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        dict(head_dim=HEAD_DIM, query_pre_attn_scalar=HEAD_DIM, sliding_window=4),
    ),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", dict(hidden_size=WIDTH)),
}
CAUSAL_MULTI_HEAD: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        dict(
            vocab_size=VOCAB, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_inner=FEED_FORWARD, n_positions=64
        ),
    ),
    "gpt_neox": (
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        dict(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=FEED_FORWARD,
            max_position_embeddings=64,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.67},
        ),
    ),
    "gptj": (
        "GPTJConfig",
        "GPTJForCausalLM",
        dict(
            vocab_size=VOCAB,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=HEADS,
            n_inner=FEED_FORWARD,
            rotary_dim=4,
            n_positions=64,
        ),
    ),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        dict(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            word_embed_proj_dim=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            ffn_dim=FEED_FORWARD,
            max_position_embeddings=64,
        ),
    ),
    "bloom": (
        "BloomConfig",
        "BloomForCausalLM",
        dict(vocab_size=VOCAB, hidden_size=WIDTH, n_layer=LAYERS, n_head=HEADS),
    ),
    "falcon": (  # as in Falcon-7B: one key and value head for all queries, attention and MLP side by side
        "FalconConfig",
        "FalconForCausalLM",
        dict(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            ffn_hidden_size=FEED_FORWARD,
            multi_query=True,
            parallel_attn=True,
            new_decoder_architecture=False,
            bias=False,
            alibi=False,
            max_position_embeddings=64,
        ),
    ),
}


EAGER_ONLY = {"gemma2", "gptj", "bloom"}  # transformers has no sdpa path for them


def _make(config_class: str, model_class: str, arguments: dict[str, Any], attn: str) -> nn.Module:
    import transformers  # here, so that the tests of plain models do not wait for it

    config = getattr(transformers, config_class)(**arguments)
    config._attn_implementation = attn
    return getattr(transformers, model_class)(config)


def _default_attn(name: str) -> str:
    return "eager" if name in EAGER_ONLY else "sdpa"


def _grouped(name: str) -> Callable[..., nn.Module]:
    config_class, model_class, arguments = CAUSAL[name]

    def factory(attn: str = _default_attn(name), kv_heads: int = KV_HEADS, **changes: Any) -> nn.Module:
        base = dict(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=FEED_FORWARD,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=kv_heads,
            max_position_embeddings=64,
            **SPECIAL,
        )
        return _make(config_class, model_class, {**base, **arguments, **changes}, attn)

    return factory


def _multi_head(name: str) -> Callable[..., nn.Module]:
    config_class, model_class, arguments = CAUSAL_MULTI_HEAD[name]

    def factory(attn: str = _default_attn(name), **changes: Any) -> nn.Module:
        return _make(config_class, model_class, {**arguments, **SPECIAL, **changes}, attn)

    return factory


def _bert(attn: str = "sdpa", **changes: Any) -> nn.Module:
    arguments = dict(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=FEED_FORWARD,
        max_position_embeddings=64,
    )
    return _make("BertConfig", "BertForMaskedLM", {**arguments, **changes}, attn)


def _t5(attn: str = "eager", **changes: Any) -> nn.Module:
    arguments = dict(
        vocab_size=VOCAB,
        d_model=HIDDEN,
        d_kv=HEAD_DIM,
        d_ff=FEED_FORWARD,
        num_layers=LAYERS,
        num_decoder_layers=LAYERS,
        num_heads=HEADS,
        relative_attention_num_buckets=12,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return _make("T5Config", "T5ForConditionalGeneration", {**arguments, **changes}, attn)


def _bart(attn: str = "sdpa", **changes: Any) -> nn.Module:
    arguments = dict(
        vocab_size=VOCAB,
        d_model=WIDTH,
        encoder_layers=LAYERS,
        decoder_layers=LAYERS,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=FEED_FORWARD,
        decoder_ffn_dim=FEED_FORWARD,
        max_position_embeddings=64,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
        **SPECIAL,
    )
    return _make("BartConfig", "BartForConditionalGeneration", {**arguments, **changes}, attn)


def _vit(attn: str = "sdpa", **changes: Any) -> nn.Module:
    arguments = dict(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=FEED_FORWARD,
        image_size=12,
        patch_size=4,
        num_channels=3,
        num_labels=23,
    )
    return _make("ViTConfig", "ViTForImageClassification", {**arguments, **changes}, attn)


def _tokens(generator: torch.Generator, batch: int, seq: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, seq), generator=generator)  # 0, 1 and 2 are special


def _causal_feed(
    generator: torch.Generator, dtype: torch.dtype, batch: int, seq: int, labels: bool = False
) -> Inputs:
    inputs = {"input_ids": _tokens(generator, batch, seq)}
    return {**inputs, "labels": _tokens(generator, batch, seq)} if labels else inputs


def _bert_feed(
    generator: torch.Generator, dtype: torch.dtype, batch: int, seq: int, labels: bool = False
) -> Inputs:
    mask = torch.ones(batch, seq, dtype=torch.long)
    mask[0, -1] = 0  # the first sentence is one word shorter
    inputs = {"input_ids": _tokens(generator, batch, seq), "attention_mask": mask}
    return {**inputs, "labels": _tokens(generator, batch, seq)} if labels else inputs


def _seq2seq_feed(
    generator: torch.Generator, dtype: torch.dtype, batch: int, seq: int, labels: bool = False
) -> Inputs:
    inputs = {"input_ids": _tokens(generator, batch, seq)}
    return {**inputs, "labels" if labels else "decoder_input_ids": _tokens(generator, batch, seq + 2)}


def _image_feed(
    generator: torch.Generator, dtype: torch.dtype, batch: int, seq: int, labels: bool = False
) -> Inputs:
    inputs = {"pixel_values": torch.randn(batch, 3, 12, 12, generator=generator, dtype=dtype)}
    return {**inputs, "labels": torch.randint(23, (batch,), generator=generator)} if labels else inputs


Variants = tuple[dict[str, object], ...]
SDPA_AND_EAGER: Variants = ({}, {"attn": "eager"})


def _variants(name: str) -> Variants:
    attention: Variants = ({},) if name in EAGER_ONLY else SDPA_AND_EAGER
    return (*attention, *({"kv_heads": 2, **v} for v in attention)) if name in CAUSAL else attention


HF_MODELS = (
    *(
        ModelCase(name, _grouped(name), _causal_feed, generative=True, variants=_variants(name))
        for name in CAUSAL
    ),
    *(
        ModelCase(name, _multi_head(name), _causal_feed, generative=True, variants=_variants(name))
        for name in CAUSAL_MULTI_HEAD
    ),
    ModelCase("bert", _bert, _bert_feed, variants=SDPA_AND_EAGER),
    ModelCase(
        "t5",
        _t5,
        _seq2seq_feed,
        generative=True,
        variants=({"attn": "eager"}, {"attn": "sdpa"}, {"feed_forward_proj": "gated-gelu"}),
    ),
    ModelCase("bart", _bart, _seq2seq_feed, generative=True, variants=SDPA_AND_EAGER),
    ModelCase("vit", _vit, _image_feed, variants=SDPA_AND_EAGER),
)
