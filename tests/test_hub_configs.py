"""The configurations and tensor names that well-known models of the hub really have, with small sizes.

Each folder is loaded by `hanmo.load` and by `transformers`; both give the same logits. Keys are as in the models' own
`config.json`, old ones included; only sizes and token ids are scaled down.
"""

from __future__ import annotations

import copy
import json
import math
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

import hanmo
from hanmo.errors import ModelError
from hanmo.inference.language_model import LanguageModel
from hanmo.models.architectures import default_head, read_config, task_of, with_head
from hanmo.models.cache import KVCache
from hanmo.models.checkpoints.huggingface import read_config as read_folder_config
from hanmo.models.checkpoints.weights import check_size
from hanmo.models.config_checks import NORMS, PLACEMENTS, POSITIONS
from hanmo.models.cost import num_parameters
from hanmo.models.heads import HeadConfig, TransformConfig
from hanmo.models.transformer import RMSNorm, Transformer, TransformerConfig
from hanmo.text.tokenizer import Tokenizer
from hanmo.text.training import train_char

from .serving_fakes import running_server

V = 96
TEXTS = ["从前有座山，山里有座庙。", "Once upon a time there was a hill.", "床前明月光，疑是地上霜。"]

State = dict[str, Tensor]


def same(state: State) -> State:
    return state


def without(prefix: str) -> Callable[[State], State]:
    """The names of a base model."""
    return lambda state: {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def gpt2_names(state: State) -> State:
    """GPT-2 itself: no prefix, and the causal masks as tensors."""
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 16, 16).tril() for i in range(2)}
    return {**without("transformer.")(state), **masks}


def distilgpt2_names(state: State) -> State:
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 16, 16, dtype=torch.uint8) for i in range(2)}
    masks |= {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    return {**state, **masks, "lm_head.weight": state["transformer.wte.weight"].clone()}


def double_heads_names(state: State) -> State:
    summary = {
        "multiple_choice_head.summary.weight": torch.ones(1, 32),
        "multiple_choice_head.summary.bias": torch.ones(1),
    }
    return {**state, **summary}


def llama2_names(state: State) -> State:
    """Meta's converted files hold the rotary frequencies of each layer."""
    return {**state, **{f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}}


def bert_names(state: State) -> State:
    """TensorFlow's names of norms; the pooler and next-sentence head; the output beside the embedding it is tied to."""
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in state.items()
    }
    more = {"bert.pooler.dense.weight": torch.ones(32, 32), "bert.pooler.dense.bias": torch.ones(32)}
    more |= {"cls.seq_relationship.weight": torch.ones(2, 32), "cls.seq_relationship.bias": torch.ones(2)}
    return {**old, **more}


def chinese_bert_names(state: State) -> State:
    more = {"bert.embeddings.position_ids": torch.arange(16).unsqueeze(0)}
    more |= {"cls.predictions.decoder.weight": state["bert.embeddings.word_embeddings.weight"].clone()}
    more |= {"cls.predictions.decoder.bias": state["cls.predictions.bias"].clone()}
    return {**state, **more}


def roberta_names(state: State) -> State:
    more = {"roberta.embeddings.position_ids": torch.arange(18).unsqueeze(0)}
    more |= {"roberta.pooler.dense.weight": torch.ones(32, 32), "roberta.pooler.dense.bias": torch.ones(32)}
    more |= {"lm_head.decoder.weight": state["roberta.embeddings.word_embeddings.weight"].clone()}
    return {**state, **more}


def minilm_names(state: State) -> State:
    return {**state, "embeddings.position_ids": torch.arange(16).unsqueeze(0)}


def distilbert_names(state: State) -> State:
    return {**state, "vocab_projector.weight": state["distilbert.embeddings.word_embeddings.weight"].clone()}


def modernbert_names(state: State) -> State:
    return {**state, "decoder.weight": state["model.embeddings.tok_embeddings.weight"].clone()}


def t5_names(state: State) -> State:
    """Old conversions of T5 hold a relative bias of the cross-attention that no version has used."""
    bias = {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": torch.ones(32, 4)}
    words = {f"{side}.embed_tokens.weight": state["shared.weight"].clone() for side in ("encoder", "decoder")}
    return {**state, **words, **bias, "lm_head.weight": state["shared.weight"].clone()}


def flan_names(state: State) -> State:
    """FLAN-T5 and mT5 have an output of their own."""
    return {**state, "lm_head.weight": torch.randn(state["shared.weight"].shape) * 0.1}


def bart_names(state: State) -> State:
    words = {
        f"model.{side}.embed_tokens.weight": state["model.shared.weight"].clone() for side in ("encoder", "decoder")
    }
    return {**state, **words}


def bart_base_names(state: State) -> State:
    """BART's base model: neither the prefix nor the bias of the output."""
    bare = without("model.")({name: tensor for name, tensor in state.items() if name != "final_logits_bias"})
    words = {f"{side}.embed_tokens.weight": state["model.shared.weight"].clone() for side in ("encoder", "decoder")}
    return {**bare, **words}


def marian_names(state: State) -> State:
    """The sinusoids are stored, and each side's copy of the shared embedding."""
    words = {
        f"model.{side}.embed_tokens.weight": state["model.shared.weight"].clone() for side in ("encoder", "decoder")
    }
    return {**state, **words}


@dataclass
class Hub:
    """A model of the hub: what its files say."""

    class_name: str  # the class of `transformers` that is compared
    raw: dict[str, Any]
    task: str = "causal-lm"
    rename: Callable[[State], State] = same
    generation: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    ends: set[int] = field(default_factory=set)


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "model_type": "llama",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "use_cache": True,
    "vocab_size": V,
}
GPT2 = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 90,
    "embd_pdrop": 0.1,
    "eos_token_id": 90,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 16,
    "n_embd": 32,
    "n_head": 4,
    "n_layer": 2,
    "n_positions": 16,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": V,
}
QWEN2 = {
    **{key: value for key, value in LLAMA.items() if key != "architectures"},
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 90,
    "eos_token_id": 91,
    "max_window_layers": 24,
    "model_type": "qwen2",
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
}
GEMMA2 = {
    **LLAMA,
    "architectures": ["Gemma2ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_logit_softcapping": 50.0,
    "bos_token_id": 2,
    "cache_implementation": "hybrid",
    "eos_token_id": 1,
    "final_logit_softcapping": 30.0,
    "head_dim": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "model_type": "gemma2",
    "pad_token_id": 0,
    "query_pre_attn_scalar": 16,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 6,
}
del GEMMA2["tie_word_embeddings"]
GEMMA3 = {
    **{key: GEMMA2[key] for key in GEMMA2 if key not in ("architectures", "hidden_act")},
    "architectures": ["Gemma3ForCausalLM"],
    "attn_logit_softcapping": None,
    "eos_token_id": [1, 93],
    "final_logit_softcapping": None,
    "model_type": "gemma3_text",
    "num_hidden_layers": 3,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window_pattern": 2,
    "torch_dtype": "bfloat16",
}
PHI3 = {
    **LLAMA,
    "_name_or_path": "Phi-3-mini-4k-instruct",
    "architectures": ["Phi3ForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
    },
    "embd_pdrop": 0.0,
    "eos_token_id": 91,
    "max_position_embeddings": 32,
    "model_type": "phi3",
    "num_key_value_heads": 4,
    "original_max_position_embeddings": 32,
    "pad_token_id": 91,
    "resid_pdrop": 0.0,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "sliding_window": 15,
    "attention_bias": False,
}
LONG = {"long_factor": [1.08, 1.5, 2.5, 5.0], "short_factor": [1.0, 1.05, 1.2, 1.5]}
BERT = {
    "architectures": ["BertForMaskedLM"],
    "attention_probs_dropout_prob": 0.1,
    "gradient_checkpointing": False,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 48,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 16,
    "model_type": "bert",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "transformers_version": "4.6.0.dev0",
    "type_vocab_size": 2,
    "use_cache": True,
    "vocab_size": V,
}
CHINESE = {
    "directionality": "bidi",
    "pooler_fc_size": 768,
    "pooler_num_attention_heads": 12,
    "pooler_num_fc_layers": 3,
    "pooler_size_per_head": 128,
    "pooler_type": "first_token_transform",
}
ROBERTA = {
    **{key: BERT[key] for key in BERT if key not in ("position_embedding_type", "gradient_checkpointing")},
    "architectures": ["RobertaForMaskedLM"],
    "bos_token_id": 0,
    "eos_token_id": 2,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 18,
    "model_type": "roberta",
    "pad_token_id": 1,
    "type_vocab_size": 1,
}
T5 = {
    "architectures": ["T5WithLMHeadModel"],
    "d_ff": 48,
    "d_kv": 8,
    "d_model": 32,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "n_positions": 512,
    "num_heads": 4,
    "num_layers": 2,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_num_buckets": 32,
    "task_specific_params": {"summarization": {"early_stopping": True, "prefix": "summarize: "}},
    "vocab_size": V,
}
FLAN = {
    **{key: T5[key] for key in T5 if key != "output_past"},
    "architectures": ["T5ForConditionalGeneration"],
    "feed_forward_proj": "gated-gelu",
    "num_decoder_layers": 2,
    "relative_attention_max_distance": 128,
    "tie_word_embeddings": False,
}
BART = {
    "_name_or_path": "bart-base",
    "activation_dropout": 0.1,
    "activation_function": "gelu",
    "add_bias_logits": False,
    "add_final_layer_norm": False,
    "architectures": ["BartModel"],
    "attention_dropout": 0.1,
    "bos_token_id": 0,
    "classif_dropout": 0.1,
    "classifier_dropout": 0.0,
    "d_model": 32,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "decoder_layerdrop": 0.0,
    "decoder_layers": 2,
    "decoder_start_token_id": 2,
    "dropout": 0.1,
    "early_stopping": True,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "encoder_layerdrop": 0.0,
    "encoder_layers": 2,
    "eos_token_id": 2,
    "forced_eos_token_id": 2,
    "forced_bos_token_id": 0,
    "gradient_checkpointing": False,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"},
    "init_std": 0.02,
    "is_encoder_decoder": True,
    "label2id": {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2},
    "max_position_embeddings": 32,
    "model_type": "bart",
    "no_repeat_ngram_size": 3,
    "normalize_before": False,
    "normalize_embedding": True,
    "num_beams": 4,
    "num_hidden_layers": 2,
    "pad_token_id": 1,
    "scale_embedding": False,
    "task_specific_params": {"summarization": {"length_penalty": 1.0, "max_length": 128, "min_length": 12}},
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": V,
}
CNN = {
    **BART,
    "_num_labels": 3,
    "architectures": ["BartForConditionalGeneration"],
    "extra_pos_embeddings": 2,
    "force_bos_token_to_be_generated": True,
    "length_penalty": 2.0,
    "max_length": 142,
    "min_length": 56,
    "output_past": True,
    "prefix": " ",
    "save_step": 58,
    "static_position_embeddings": False,
}
MARIAN = {
    **{key: BART[key] for key in BART if key not in ("_name_or_path", "early_stopping", "forced_bos_token_id")},
    "_num_labels": 3,
    "activation_dropout": 0.0,
    "activation_function": "swish",
    "architectures": ["MarianMTModel"],
    "bad_words_ids": [[95]],
    "bos_token_id": 0,
    "decoder_start_token_id": 95,
    "decoder_vocab_size": V,
    "eos_token_id": 0,
    "force_bos_token_to_be_generated": False,
    "forced_eos_token_id": 0,
    "max_length": 512,
    "model_type": "marian",
    "normalize_embedding": False,
    "num_beams": 6,
    "pad_token_id": 95,
    "scale_embedding": True,
    "share_encoder_decoder_embeddings": True,
    "static_position_embeddings": True,
}
ENDS = {"bos_token_id": 90, "eos_token_id": [91, 90], "pad_token_id": 90}

HUB: dict[str, Hub] = {
    "gpt2": Hub("GPT2LMHeadModel", GPT2, rename=gpt2_names, ends={90}),
    "distilgpt2": Hub(
        "GPT2LMHeadModel",
        {**GPT2, "_num_labels": 1, "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}},
        rename=distilgpt2_names,
    ),
    "gpt2-double-heads": Hub(
        "GPT2LMHeadModel", {**GPT2, "architectures": ["GPT2DoubleHeadsModel"]}, rename=double_heads_names
    ),
    "Llama-2-7b-hf": Hub(
        "LlamaForCausalLM",
        {**LLAMA, "num_key_value_heads": 4, "pretraining_tp": 1, "rope_scaling": None, "pad_token_id": 0},
        rename=llama2_names,
        dtype=torch.float16,
        generation={"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "temperature": 0.6, "top_p": 0.9},
        ends={2},
    ),
    "llama-7b-first": Hub(  # neither grouped heads nor a base; an id that means "none"
        "LlamaForCausalLM",
        {
            **{k: v for k, v in LLAMA.items() if k not in ("num_key_value_heads", "max_position_embeddings")},
            "max_sequence_length": 2048,
            "max_position_embeddings": 64,
            "pad_token_id": -1,
            "pretraining_tp": 2,
        },
        generation={"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": -1},
    ),
    "Llama-3.2-1B": Hub(
        "LlamaForCausalLM",
        {
            **LLAMA,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "head_dim": 8,
            "mlp_bias": False,
            "eos_token_id": [90, 91, 92],
            "pretraining_tp": 1,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 16,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
        },
        dtype=torch.bfloat16,
        generation={"bos_token_id": 89, "do_sample": True, "eos_token_id": [90, 91, 92], "temperature": 0.6},
        ends={90, 91, 92},
    ),
    "SmolLM2-135M": Hub(
        "LlamaForCausalLM",
        {
            **LLAMA,
            "attention_bias": False,
            "is_llama_config": True,
            "mlp_bias": False,
            "pretraining_tp": 1,
            "rope_interleaved": False,
            "rope_scaling": None,
            "rope_theta": 100000,
            "tie_word_embeddings": True,
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
        dtype=torch.bfloat16,
    ),
    "TinyLlama-1.1B-Chat": Hub(
        "LlamaForCausalLM",
        {**LLAMA, "attention_bias": False, "pretraining_tp": 1, "rope_scaling": None, "rope_theta": 10000.0},
        generation={"bos_token_id": 1, "eos_token_id": 2, "max_length": 2048, "pad_token_id": 0},
    ),
    "Mistral-7B-v0.1": Hub(
        "MistralForCausalLM",
        {**LLAMA, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "rope_theta": 10000.0,
         "sliding_window": 6},
    ),
    "Mistral-7B-v0.3": Hub(
        "MistralForCausalLM",
        {**LLAMA, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "rope_theta": 1000000.0,
         "sliding_window": None, "attention_dropout": 0.0, "head_dim": None},
    ),
    "e5-mistral": Hub(
        "MistralModel",
        {**LLAMA, "architectures": ["MistralModel"], "model_type": "mistral", "sliding_window": 6, "pad_token_id": 2},
        task="embedding",
    ),
    "Qwen2-0.5B": Hub("Qwen2ForCausalLM", QWEN2, generation={"bos_token_id": 90, "eos_token_id": 90}),
    "Qwen2.5-0.5B-Instruct": Hub(
        "Qwen2ForCausalLM",
        {**QWEN2, "max_window_layers": 21},
        dtype=torch.bfloat16,
        generation={**ENDS, "do_sample": True, "repetition_penalty": 1.1, "temperature": 0.7, "top_k": 20},
        ends={90, 91},
    ),
    "Qwen2.5-7B-Instruct-yarn": Hub(
        "Qwen2ForCausalLM",
        {**QWEN2, "tie_word_embeddings": False,
         "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32, "type": "yarn"}},
    ),
    "Qwen2.5-7B-Instruct-1M": Hub(
        "Qwen2ForCausalLM",
        {**QWEN2, "dual_chunk_attention_config": {"chunk_size": 262144, "local_size": 8192,
                                                  "original_max_position_embeddings": 262144}},
    ),
    "Qwen3-0.6B": Hub(
        "Qwen3ForCausalLM",
        {**QWEN2, "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 16,
         "max_window_layers": 28, "model_type": "qwen3", "rope_scaling": None, "sliding_window": None},
        generation=ENDS,
    ),
    "Qwen3-Embedding-0.6B": Hub(
        "Qwen3ForCausalLM",
        {**QWEN2, "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 16, "model_type": "qwen3",
         "rope_scaling": None, "sliding_window": None},
        rename=without("model."),
    ),
    "gemma-2-2b": Hub("Gemma2ForCausalLM", GEMMA2, generation={"_from_model_config": True, "bos_token_id": 2,
                                                                "cache_implementation": "hybrid", "eos_token_id": 1}),
    "gemma-3-1b-it": Hub(
        "Gemma3ForCausalLM", GEMMA3,
        generation={"cache_implementation": "hybrid", "do_sample": True, "eos_token_id": [1, 93], "top_k": 64},
        ends={1, 93},
    ),
    "gemma-3-270m": Hub(
        "Gemma3ForCausalLM",
        {**{k: v for k, v in GEMMA3.items() if k != "sliding_window_pattern"}, "_sliding_window_pattern": 6,
         "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
         "use_bidirectional_attention": False, "rope_local_base_freq": 10000.0},
        dtype=torch.bfloat16,
    ),
    "Phi-3-mini-4k-instruct": Hub("Phi3ForCausalLM", PHI3, generation={"eos_token_id": [91, 92], "pad_token_id": 91}),
    "Phi-3-mini-128k-instruct": Hub(
        "Phi3ForCausalLM",
        {**PHI3, "max_position_embeddings": 128, "original_max_position_embeddings": 16, "sliding_window": 262144,
         "rope_scaling": {**LONG, "type": "longrope"}},
    ),
    "Phi-3-mini-128k-first": Hub(
        "Phi3ForCausalLM",
        {**PHI3, "max_position_embeddings": 128, "original_max_position_embeddings": 16, "sliding_window": 262144,
         "rope_scaling": {**LONG, "type": "su"}},
    ),
    "Phi-4-mini-instruct": Hub(
        "Phi3ForCausalLM",
        {**PHI3, "max_position_embeddings": 128, "original_max_position_embeddings": 16, "partial_rotary_factor": 0.75,
         "num_key_value_heads": 2, "interpolate_factor": 1, "full_attn_mod": 1, "lm_head_bias": False,
         "mlp_bias": False, "tie_word_embeddings": True, "sliding_window": 262144,
         "rope_scaling": {"long_factor": LONG["long_factor"][:3], "short_factor": LONG["short_factor"][:3],
                          "type": "longrope"}},
    ),
    "bert-base-uncased": Hub("BertForMaskedLM", BERT, "masked-lm", bert_names),
    "bert-base-chinese": Hub("BertForMaskedLM", {**BERT, **CHINESE}, "masked-lm", chinese_bert_names),
    "chinese-roberta-wwm-ext": Hub(
        "BertForMaskedLM",
        {**BERT, **CHINESE, "bos_token_id": 0, "eos_token_id": 2, "output_past": True, "type_vocab_size": 2},
        "masked-lm",
        bert_names,
    ),
    "bert-for-pretraining": Hub(
        "BertForMaskedLM", {**BERT, "architectures": ["BertForPreTraining"]}, "masked-lm", bert_names
    ),
    "all-MiniLM-L6-v2": Hub(
        "BertModel",
        {**BERT, "_name_or_path": "nreimers/MiniLM-L6-H384-uncased", "architectures": ["BertModel"]},
        "embedding",
        minilm_names,
    ),
    "bge-small-zh": Hub(
        "BertModel",
        {**BERT, **CHINESE, "architectures": ["BertModel"], "classifier_dropout": None, "id2label": {"0": "LABEL_0"},
         "label2id": {"LABEL_0": 0}},
        "embedding",
        minilm_names,
    ),
    "roberta-base": Hub("RobertaForMaskedLM", ROBERTA, "masked-lm", roberta_names),
    "xlm-roberta-base": Hub(
        "XLMRobertaForMaskedLM",
        {**ROBERTA, "architectures": ["XLMRobertaForMaskedLM"], "model_type": "xlm-roberta", "output_past": True,
         "position_embedding_type": "absolute"},
        "masked-lm",
        roberta_names,
    ),
    "distilbert-base-uncased": Hub(
        "DistilBertForMaskedLM",
        {
            "activation": "gelu",
            "architectures": ["DistilBertForMaskedLM"],
            "attention_dropout": 0.1,
            "dim": 32,
            "dropout": 0.1,
            "hidden_dim": 48,
            "initializer_range": 0.02,
            "max_position_embeddings": 16,
            "model_type": "distilbert",
            "n_heads": 4,
            "n_layers": 2,
            "pad_token_id": 0,
            "qa_dropout": 0.1,
            "seq_classif_dropout": 0.2,
            "sinusoidal_pos_embds": False,
            "tie_weights_": True,
            "vocab_size": V,
        },
        "masked-lm",
        distilbert_names,
    ),
    "ModernBERT-base": Hub(
        "ModernBertForMaskedLM",
        {
            "architectures": ["ModernBertForMaskedLM"],
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 90,
            "classifier_activation": "gelu",
            "classifier_bias": False,
            "classifier_dropout": 0.0,
            "classifier_pooling": "mean",
            "cls_token_id": 90,
            "decoder_bias": True,
            "deterministic_flash_attn": False,
            "embedding_dropout": 0.0,
            "eos_token_id": 91,
            "global_attn_every_n_layers": 3,
            "global_rope_theta": 160000.0,
            "gradient_checkpointing": False,
            "hidden_activation": "gelu",
            "hidden_size": 32,
            "initializer_cutoff_factor": 2.0,
            "initializer_range": 0.02,
            "intermediate_size": 48,
            "layer_norm_eps": 1e-05,
            "local_attention": 8,
            "local_rope_theta": 10000.0,
            "max_position_embeddings": 64,
            "mlp_bias": False,
            "mlp_dropout": 0.0,
            "model_type": "modernbert",
            "norm_bias": False,
            "norm_eps": 1e-05,
            "num_attention_heads": 4,
            "num_hidden_layers": 4,
            "pad_token_id": 92,
            "position_embedding_type": "absolute",
            "sep_token_id": 91,
            "tie_word_embeddings": True,
            "torch_dtype": "float32",
            "transformers_version": "4.47.0.dev0",
            "vocab_size": V,
        },
        "masked-lm",
        modernbert_names,
    ),
    "t5-small": Hub("T5ForConditionalGeneration", T5, "seq2seq-lm", t5_names, {"decoder_start_token_id": 0}),
    "flan-t5-small": Hub("T5ForConditionalGeneration", FLAN, "seq2seq-lm", flan_names, {"decoder_start_token_id": 0}),
    "mt5-small": Hub(
        "MT5ForConditionalGeneration",
        {**FLAN, "architectures": ["MT5ForConditionalGeneration"], "model_type": "mt5",
         "tokenizer_class": "T5Tokenizer"},
        "seq2seq-lm",
        flan_names,
    ),
    "bart-base": Hub("BartForConditionalGeneration", BART, "seq2seq-lm", bart_base_names),
    "bart-large-cnn": Hub("BartForConditionalGeneration", CNN, "seq2seq-lm", bart_names),
    "opus-mt-zh-en": Hub("MarianMTModel", MARIAN, "seq2seq-lm", bart_names),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    made = train_char([*TEXTS, "".join(chr(0x4E8C + number) for number in range(V - 41))])
    assert made.vocab_size == V
    return made


def write_folder(hub: Hub, folder: Path, tokenizer: Tokenizer) -> Any:
    """The model's folder as the hub has it; the network of `transformers` that it holds."""
    known = json.loads(json.dumps(hub.raw).replace('"su"', '"longrope"'))  # the first name, forgotten since
    config = transformers.AutoConfig.for_model(**known)
    torch.manual_seed(0)
    network = getattr(transformers, hub.class_name)(config)
    state: State = {}
    seen: set[int] = set()
    for name, tensor in sorted(network.state_dict().items(), key=lambda item: "lm_head" in item[0]):
        if tensor.data_ptr() in seen:
            continue  # tied
        seen.add(tensor.data_ptr())
        keep = "embed_positions" in name and hub.raw["model_type"] == "marian"
        noise = torch.randn(tensor.shape) * (0.2 if tensor.dim() == 1 else 0.6 / tensor.size(-1) ** 0.5)
        state[name] = (tensor if keep else tensor + noise if tensor.dim() == 1 else noise).to(hub.dtype)
    if hub.task == "masked-lm":
        state = {
            name: tensor
            for name, tensor in state.items()
            if "decoder.bias" not in name or "predictions.bias" not in name
        }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: t.contiguous().clone() for name, t in hub.rename(state).items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    (folder / "config.json").write_text(json.dumps(known))
    if hub.generation:
        (folder / "generation_config.json").write_text(json.dumps(hub.generation))
    tokenizer.save(folder)
    theirs, info = getattr(transformers, hub.class_name).from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    missing = {name for name in info["missing_keys"] if name != "final_logits_bias" and "pooler" not in name}
    assert not missing and not info["mismatched_keys"], info
    (folder / "config.json").write_text(json.dumps(hub.raw))
    return theirs.eval()


def close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-4


@pytest.mark.parametrize("name", HUB)
@torch.no_grad()
def test_models_of_the_hub_load(name: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    hub = HUB[name]
    theirs = write_folder(hub, tmp_path / "m", tokenizer)
    loaded = hanmo.load(tmp_path / "m", engine="torch")
    network = loaded.model
    assert isinstance(network, Transformer) and task_of(network.config) == hub.task
    assert network.output_weight.dtype == torch.float32
    ids = torch.randint(3, V - 8, (2, 13), generator=torch.Generator().manual_seed(1))
    if hub.task == "seq2seq-lm":
        found = network(ids[:, :7], memory=network.encode(ids))
        close(found, theirs(input_ids=ids, decoder_input_ids=ids[:, :7]).logits)
    elif hub.task == "embedding":
        close(network.hidden(ids), theirs(ids).last_hidden_state)
    else:
        for length in (1, 7, 13):
            close(network(ids[:, :length]), theirs(ids[:, :length]).logits)
    if isinstance(loaded, LanguageModel):
        assert hub.ends <= loaded.eos_ids
        assert len(loaded.generate("从前", max_new_tokens=4, ignore_eos=True)[0].ids) == 4
        if hub.task == "causal-lm":
            as_usual = hanmo.load(tmp_path / "m")  # by the native engine, where it is there and knows the layout
            expected = torch.from_numpy(loaded.score(ids.numpy()))
            close(torch.from_numpy(as_usual.score(ids.numpy())), expected)


@pytest.mark.parametrize("name", ["t5-small", "flan-t5-small", "bart-base", "bart-large-cnn", "opus-mt-zh-en"])
@torch.no_grad()
def test_answers_begin_and_avoid_what_the_configuration_says(name: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The first tokens of an answer, and Marian's padding, which is never written."""
    hub = HUB[name]
    theirs = write_folder(hub, tmp_path / "m", tokenizer)
    ours = hanmo.load(tmp_path / "m")
    assert isinstance(ours, LanguageModel)
    assert isinstance(ours.model, Transformer)
    if ours.model.lm_bias is not None and name == "opus-mt-zh-en":  # the favourite is what must not be written
        ours.model.lm_bias[95] = 50.0
        theirs.final_logits_bias[0, 95] = 50.0
    options = {"forced_eos_token_id": None, "no_repeat_ngram_size": 0, "min_length": 0, "num_beams": 1}
    ids = torch.randint(3, V - 8, (1, 9), generator=torch.Generator().manual_seed(2))
    expected = theirs.generate(
        ids, do_sample=False, max_new_tokens=9, eos_token_id=None, early_stopping=False, length_penalty=1.0, **options
    )[0].tolist()
    first = 2 if hub.raw.get("forced_bos_token_id") is not None else 1
    written = ours.generate(ids[0].tolist(), max_new_tokens=10 - first, ignore_eos=True)[0].ids
    assert written == expected[first:]
    scores = ours.answer_logprobs(ids[0].tolist(), written)
    logits = theirs(input_ids=ids, decoder_input_ids=torch.tensor([expected])).logits[0, first - 1 : -1]
    torch.testing.assert_close(scores, logits.log_softmax(-1).gather(1, torch.tensor(written)[:, None])[:, 0])


@torch.no_grad()
def test_longrope_reads_again_where_its_factors_change(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Keys cached with the short factors are no use once a row is longer; a batch writes what each row writes alone."""
    theirs = write_folder(HUB["Phi-3-mini-128k-instruct"], tmp_path / "m", tokenizer)
    ours = hanmo.load(tmp_path / "m")
    prompts = [torch.randint(3, V - 8, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (4, 14, 40)]
    alone = [ours.generate([ids], max_new_tokens=20, ignore_eos=True)[0].ids for ids in prompts]
    assert [item.ids for item in ours.generate(prompts, max_new_tokens=20, ignore_eos=True)] == alone
    for ids, written in zip(prompts, alone, strict=True):
        whole = torch.tensor([ids])
        for id in written:  # each token read anew
            assert int(theirs(whole).logits[0, -1].argmax()) == id
            whole = torch.cat((whole, torch.tensor([[id]])), dim=1)


LEARNERS = (
    "gpt2", "Llama-3.2-1B", "Mistral-7B-v0.1", "Qwen2-0.5B", "Qwen3-0.6B", "gemma-2-2b", "gemma-3-1b-it",
    "Phi-4-mini-instruct", "bert-base-chinese", "roberta-base", "distilbert-base-uncased", "ModernBERT-base",
    "t5-small", "flan-t5-small", "bart-large-cnn", "opus-mt-zh-en",
)  # fmt: skip


@pytest.mark.parametrize("name", LEARNERS)
def test_every_architecture_learns(name: str) -> None:
    """From `initialize`, the loss of one batch falls; hidden words, continuations or answers."""
    config = read_config(HUB[name].raw)
    network = Transformer(config)
    network.initialize(0)
    network.train()
    assert num_parameters(config) == sum(parameter.numel() for parameter in network.parameters())
    ids = torch.randint(3, V, (4, 12), generator=torch.Generator().manual_seed(0))
    targets = ids.clone()
    inputs = ids
    options: dict[str, Any] = {}
    if HUB[name].task == "masked-lm":
        inputs = ids.clone()
        inputs[:, ::4] = 1
        targets[inputs != 1] = -1
    else:
        inputs, targets = ids[:, :-1], ids[:, 1:]
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    torch.manual_seed(0)
    losses = []
    for _ in range(30):
        if config.encoder:
            options = {"memory": network.encode(ids)}
        loss = network.loss(inputs, targets, **options) / (targets >= 0).sum()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        assert not [name for name, parameter in network.named_parameters() if parameter.grad is None]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert abs(losses[0] - math.log(V)) < 1.5
    assert losses[-1] < 0.9 * losses[0]


HEADS = [
    ("bert-base-chinese", "sequence-classification", {}),
    ("bert-base-chinese", "token-classification", {"crf": True}),
    ("roberta-base", "sequence-classification", {}),
    ("ModernBERT-base", "span-extraction", {}),
    ("distilbert-base-uncased", "token-classification", {}),
    ("Qwen3-0.6B", "sequence-classification", {}),
]


@pytest.mark.parametrize(("name", "task", "choices"), HEADS)
def test_every_head_learns(name: str, task: str, choices: dict[str, Any]) -> None:
    config = read_config(HUB[name].raw)
    labels = ("start", "end") if task == "span-extraction" else ("a", "b", "c")
    config = with_head(config, default_head(config, task, labels, **choices))
    network = Transformer(config)
    network.initialize(0)
    assert num_parameters(config) == sum(parameter.numel() for parameter in network.parameters())
    network.train()
    ids = torch.randint(3, V, (6, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, 5:] = False
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)
    torch.manual_seed(0)
    losses = []
    for _ in range(30):
        scores = network(ids, mask_BS=mask)
        assert network.head is not None
        if task == "sequence-classification":
            loss = F.cross_entropy(scores, ids[:, 1] % 3)
        elif task == "span-extraction":
            loss = F.cross_entropy(scores, ids[:, :2] % 5)  # over the positions
        elif choices:
            loss = network.head.crf(scores, ids % 3, mask)
        else:
            loss = F.cross_entropy(scores[mask], ids[mask] % 3)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        assert not [name for name, parameter in network.named_parameters() if parameter.grad is None]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]


HOSTILE: tuple[Any, ...] = (
    None, -1, 0, 3, 10**12, 10**400, -0.5, 1e308, math.nan, math.inf, "", "x", True, [], [None], ["x"] * 3, {},
    {"a": 1},    {"rope_type": "linear", "factor": "x"}, {"rope_type": "yarn", "factor": 0}, {"rope_type": ["x"]},
    {"rope_type": "llama3", "factor": 2, "low_freq_factor": 1, "high_freq_factor": 1},
    {"rope_type": "longrope", "short_factor": [1], "long_factor": "x"},
    {"rope_type": "longrope", "short_factor": [0] * 4, "long_factor": [1] * 4},
    {"full_attention": 1, "sliding_attention": None}, {"0": "a", "x": "b"}, {"0": "a", "1": "a"},
)  # fmt: skip
EXTRA = (
    "num_key_value_heads", "head_dim", "layer_types", "rope_scaling", "rope_parameters", "rope_theta", "id2label",
    "num_labels", "classifier_dropout", "hanmo_crf", "pad_token_id", "original_max_position_embeddings", "n_inner",
    "partial_rotary_factor", "num_decoder_layers", "feed_forward_proj", "_sliding_window_pattern", "use_sliding_window",
)  # fmt: skip


@pytest.mark.parametrize("name", LEARNERS)
def test_no_value_breaks_the_reader(name: str) -> None:
    """Every key with every hostile value: a network of modest description, or a ModelError."""
    raw = HUB[name].raw
    for key in (*raw, *EXTRA):
        for value in HOSTILE:
            try:
                config = read_folder_config({**raw, key: value}, Path("config.json"))
                check_size(config, 200, "")
                with torch.device("meta"):
                    Transformer(config)
            except ModelError as error:
                assert len(str(error)) < 1500


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gpt2", {"n_embd": "x"}, "n_embd must be a positive whole number, not 'x'"),
        ("gpt2", {"n_layer": 10**400}, "n_layer must be .* not a number far too large"),
        ("Llama-3.2-1B", {"rms_norm_eps": math.nan}, "rms_norm_eps must be a number above 0, not NaN"),
        ("Llama-3.2-1B", {"vocab_size": None}, "the key 'vocab_size' is missing"),
        ("Llama-3.2-1B", {"rope_scaling": {"rope_type": "linear"}}, "factor must be a number above 0, not None"),
        ("gemma-2-2b", {"num_hidden_layers": 10**12}, "num_hidden_layers must be a whole number from 1 to 16384"),
        ("bert-base-chinese", {"hidden_dropout_prob": "x"}, "hidden_dropout_prob must be a number from 0 to 1"),
        ("Phi-3-mini-128k-instruct", {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [1.0]}},
         "LongRoPE needs 4 factors, there are 1 short and 1 long"),
        ("t5-small", {"relative_attention_num_buckets": 2}, "2 buckets cannot hold distances up to 128"),
    ],
)  # fmt: skip
def test_impossible_values_are_named(name: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        read_folder_config({**HUB[name].raw, **change}, Path("m/config.json"))
    assert caught.value.where == "m/config.json" and caught.value.zh


@torch.no_grad()
def test_long_rows_are_scored_in_pieces(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(HUB["gemma-2-2b"], tmp_path / "m", tokenizer)
    ours = hanmo.load(tmp_path / "m")
    ids = torch.randint(3, V, (2, 40), generator=torch.Generator().manual_seed(0)).numpy()
    whole = ours.score(ids)
    monkeypatch.setattr("hanmo.inference.decoders.PREFILL_TOKENS", 9)
    torch.testing.assert_close(torch.from_numpy(ours.score(ids)), torch.from_numpy(whole), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", LEARNERS)
@torch.no_grad()
def test_low_precision_stays_near_float32(name: str, dtype: torch.dtype) -> None:
    """Masks, rotations and biases follow the precision of the weights, with padding and a cache."""
    config = read_config(HUB[name].raw)
    network = Transformer(config)
    network.initialize(0)
    torch.manual_seed(0)
    for parameter in network.parameters():
        if parameter.dim() > 1:
            parameter.copy_(torch.randn(parameter.shape) * 0.4 / parameter.size(1) ** 0.5)
    low = copy.deepcopy(network).to(dtype).eval()
    network.eval()
    ids, mask = torch.randint(3, V, (2, 12)), torch.ones(2, 12, dtype=torch.bool)
    mask[1, 4:] = not config.causal
    mask[1, :4] = not config.causal or config.encoder is not None
    if config.causal and config.encoder is None:
        mask[1, 4:] = True
    options: dict[str, Any] = {}
    results = []
    for model in (network, low):
        if config.encoder:
            options = {"memory": model.encode(ids)}
            mask[:] = True
        whole = model(ids, mask_BS=mask, **options)
        assert whole.dtype == torch.float32
        if config.causal:
            cache = KVCache(config, 2, 12, model.output_weight.dtype)
            parts = [
                model(ids[:, a:b], mask_BS=mask[:, :b], cache=cache, **options) for a, b in ((0, 5), (5, 11), (11, 12))
            ]
            pieces = torch.cat(parts, dim=1)
            torch.testing.assert_close(pieces[mask], whole[mask], atol=0.06 * float(whole.abs().max()), rtol=0)
        results.append(whole[mask])
    assert float((results[0] - results[1]).abs().max() / results[0].abs().max()) < 0.06


@torch.no_grad()
def test_gemma_norms_keep_their_weights_in_bfloat16() -> None:
    """A weight of 0.001 beside one would vanish in bfloat16's eight bits."""
    norm = RMSNorm(64, 1e-6, 1.0).bfloat16()
    norm.weight.fill_(0.003)
    x = torch.full((1, 64), 1.25).bfloat16()
    theirs = Gemma3RMSNorm(64).bfloat16()
    theirs.weight.fill_(0.003)
    assert torch.equal(norm(x), theirs(x))
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(norm(x), theirs(x))


def test_encoder_decoders_are_served(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The source ends as the model expects, the answer has its own room, log-probabilities are those of the answer."""
    write_folder(HUB["bart-large-cnn"], tmp_path / "m", tokenizer)
    model = hanmo.load(tmp_path / "m")
    assert isinstance(model, LanguageModel) and model.prompt_suffix
    prompt = "床前明月光，疑是地上霜。" * 2
    body = {"model": "fake", "prompt": prompt, "max_tokens": 20, "temperature": 0, "logprobs": 0}
    with running_server(model) as address:
        request = urllib.request.Request(
            f"{address}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request) as reply:
            answer = json.load(reply)["choices"][0]
    written = model.generate(prompt, max_new_tokens=20)[0]
    assert answer["text"] == written.text and answer["finish_reason"] == written.finish_reason
    expected = model.answer_logprobs(prompt, written.ids).tolist()
    assert answer["logprobs"]["token_logprobs"] == pytest.approx(expected, abs=1e-4)


def odd_networks() -> st.SearchStrategy[TransformerConfig]:
    """Networks of any combination of the block's choices, with an encoder beside them, a head, or neither."""
    flags = ("tie_embeddings", "qk_norm", "attention_bias", "mlp_bias", "output_bias", "causal", "norm_bias",
             "first_norm", "final_norm", "embedding_norm", "gated", "lm", "lm_bias")  # fmt: skip
    stack = st.builds(
        TransformerConfig, st.just(11), st.just(8), st.integers(1, 3), st.just(4), st.sampled_from((1, 2, 4)),
        st.sampled_from((2, 6)), st.sampled_from((5, 16)), st.just(16),
        norm=st.sampled_from(NORMS), norm_placement=st.sampled_from(PLACEMENTS), positions=st.sampled_from(POSITIONS),
        token_types=st.sampled_from((0, 2)), position_offset=st.sampled_from((0, 2)),
        sliding_window=st.sampled_from((None, 3)),
        lm_transform=st.sampled_from((None, TransformConfig(), TransformConfig(bias=False, norm_bias=False))),
        **{name: st.booleans() for name in flags},
    )  # fmt: skip
    heads = st.builds(
        HeadConfig, st.just("token-classification"), st.just(("a", "b")), crf=st.booleans(),
        transform=st.sampled_from((None, TransformConfig(norm=False))),
    )  # fmt: skip
    sources = st.builds(
        lambda one, shared: replace(one, causal=False, lm=False, shared_embedding=shared), stack, st.booleans()
    )
    return st.one_of(
        stack,
        st.builds(lambda one, head: replace(one, lm=False, head=head), stack, heads),
        st.builds(lambda one, source: replace(one, causal=True, encoder=source), stack, sources),
    )


@settings(max_examples=150, deadline=None)
@given(config=odd_networks())
def test_odd_combinations_compute_and_are_counted(config: TransformerConfig) -> None:
    network = Transformer(config)
    network.initialize(0)
    assert num_parameters(config) == sum(parameter.numel() for parameter in network.parameters())
    ids = torch.randint(0, 11, (2, 7))
    with torch.no_grad():
        memory = network.encode(ids) if config.encoder else None
        whole = network.eval()(ids, memory=memory)
        assert whole.isfinite().all()
        if config.causal and config.head is None:
            cache = KVCache(config, 2, 7)
            parts = [network(ids[:, a:b], memory=memory, cache=cache) for a, b in ((0, 2), (2, 3), (3, 7))]
            torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-4)
