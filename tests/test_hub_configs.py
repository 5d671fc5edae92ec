"""The configurations and tensor names that well-known models of the hub really have, with small sizes.

Each folder is loaded by `hanmo.load` and by `transformers`; both give the same logits. Keys are as in the models' own
`config.json`, old ones included; only sizes and token ids are scaled down.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

import hanmo
from hanmo.inference.engine import LanguageModel
from hanmo.models.architectures import task_of
from hanmo.models.transformer import Transformer
from hanmo.text.tokenizer import Tokenizer
from hanmo.text.training import train_char

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
    summary = {"multiple_choice_head.summary.weight": torch.ones(1, 32), "multiple_choice_head.summary.bias": torch.ones(1)}
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
    words = {f"model.{side}.embed_tokens.weight": state["model.shared.weight"].clone() for side in ("encoder", "decoder")}
    return {**state, **words}


def bart_base_names(state: State) -> State:
    """BART's base model: neither the prefix nor the bias of the output."""
    bare = without("model.")({name: tensor for name, tensor in state.items() if name != "final_logits_bias"})
    words = {f"{side}.embed_tokens.weight": state["model.shared.weight"].clone() for side in ("encoder", "decoder")}
    return {**bare, **words}


def marian_names(state: State) -> State:
    """The sinusoids are stored, and each side's copy of the shared embedding."""
    words = {f"model.{side}.embed_tokens.weight": state["model.shared.weight"].clone() for side in ("encoder", "decoder")}
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
    "Qwen2-0.5B": Hub("Qwen2ForCausalLM", QWEN2, generation={"bos_token_id": 90, "do_sample": False, "eos_token_id": 90}),
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
        {**QWEN2, "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 16, "max_window_layers": 28,
         "model_type": "qwen3", "rope_scaling": None, "sliding_window": None},
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
         "layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "use_bidirectional_attention": False,
         "rope_local_base_freq": 10000.0},
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
         "num_key_value_heads": 2, "interpolate_factor": 1, "full_attn_mod": 1, "lm_head_bias": False, "mlp_bias": False,
         "tie_word_embeddings": True, "sliding_window": 262144,
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
    "bert-for-pretraining": Hub("BertForMaskedLM", {**BERT, "architectures": ["BertForPreTraining"]}, "masked-lm", bert_names),
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
    "t5-small": Hub("T5ForConditionalGeneration", T5, "seq2seq-lm", t5_names, {"decoder_start_token_id": 0, "eos_token_id": 1}),
    "flan-t5-small": Hub("T5ForConditionalGeneration", FLAN, "seq2seq-lm", flan_names, {"decoder_start_token_id": 0}),
    "mt5-small": Hub(
        "MT5ForConditionalGeneration",
        {**FLAN, "architectures": ["MT5ForConditionalGeneration"], "model_type": "mt5", "tokenizer_class": "T5Tokenizer"},
        "seq2seq-lm",
        flan_names,
    ),
    "bart-base": Hub("BartForConditionalGeneration", BART, "seq2seq-lm", bart_base_names),
    "bart-large-cnn": Hub("BartForConditionalGeneration", CNN, "seq2seq-lm", bart_names),
    "opus-mt-zh-en": Hub("MarianMTModel", MARIAN, "seq2seq-lm", marian_names),
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
        state = {name: tensor for name, tensor in state.items() if "decoder.bias" not in name or "predictions.bias" not in name}
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous().clone() for name, t in hub.rename(state).items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(known))
    if hub.generation:
        (folder / "generation_config.json").write_text(json.dumps(hub.generation))
    tokenizer.save(folder)
    theirs, info = getattr(transformers, hub.class_name).from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
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
    loaded = hanmo.load(tmp_path / "m")
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


@pytest.mark.parametrize("name", ["t5-small", "flan-t5-small", "bart-base", "bart-large-cnn", "opus-mt-zh-en"])
@torch.no_grad()
def test_answers_begin_and_avoid_what_the_configuration_says(name: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The first tokens of an answer, and Marian's padding, which is never written."""
    hub = HUB[name]
    theirs = write_folder(hub, tmp_path / "m", tokenizer)
    ours = hanmo.load(tmp_path / "m")
    assert isinstance(ours, LanguageModel)
    if hub.raw["model_type"] == "marian":  # the favourite is what must not be written
        for network in (theirs, ours.model):
            bias = theirs.final_logits_bias[0] if network is theirs else network.lm_bias
            bias[95] = 50.0
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
