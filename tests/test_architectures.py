"""Every architecture against `transformers`: the same weights give the same logits, both ways through the folder."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from hanmo.errors import ModelError
from hanmo.models.architectures import (
    ARCHITECTURES,
    default_head,
    hand_over,
    read_config,
    take_over,
    task_of,
    with_head,
    write_config,
)
from hanmo.models.architectures.bart import original_transformer
from hanmo.models.cache import KVCache
from hanmo.models.cost import forward_flops_per_token, num_parameters
from hanmo.models.transformer import Transformer, TransformerConfig, build

V, CONTEXT, WINDOW = 61, 24, 6
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": CONTEXT,
    **IDS,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 5000.0,
}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.3, 1.5],
    "long_factor": [1.5, 2.0, 3.0, 5.0],
    "original_max_position_embeddings": 10,
    "rope_theta": 10000.0,
    "factor": 2.4,
}
GEMMA = {**LLAMA, "head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": WINDOW}
BERT = {key: LLAMA[key] for key in LLAMA if key != "num_key_value_heads"}
MODERN = {**BERT, "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2, "num_hidden_layers": 4}
SEQ2SEQ = {
    "vocab_size": V,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": CONTEXT,
    "decoder_start_token_id": 0,
    "forced_eos_token_id": None,
    "forced_bos_token_id": None,
    **IDS,
}
T5 = {
    "vocab_size": V,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 12,
    "n_positions": CONTEXT,
    "decoder_start_token_id": 0,
    **IDS,
}
GPT2 = {"vocab_size": V, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT, **IDS}
DISTIL = {"vocab_size": V, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": CONTEXT}

DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", GPT2),
    "gpt2-untied": ("GPT2", {**GPT2, "tie_word_embeddings": False, "n_inner": 40}),
    "llama2": ("Llama", {**LLAMA, "num_key_value_heads": 4}),
    "llama3": ("Llama", {**LLAMA, "rope_parameters": LLAMA3}),
    "llama-one-kv-head": ("Llama", {**LLAMA, "num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}),
    "llama-yarn": ("Llama", {**LLAMA, "rope_parameters": YARN}),
    "llama-linear": ("Llama", {**LLAMA, "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}}),
    "smollm2": ("Llama", {**LLAMA, "tie_word_embeddings": True, "num_attention_heads": 6, "num_key_value_heads": 2,
                          "hidden_size": 48}),
    "mistral": ("Mistral", {**LLAMA, "sliding_window": WINDOW, "head_dim": 16}),
    "mistral-full": ("Mistral", {**LLAMA, "sliding_window": None}),
    "qwen2": ("Qwen2", {**LLAMA, "tie_word_embeddings": True}),
    "qwen2-sliding": ("Qwen2", {**LLAMA, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {**LLAMA, "head_dim": 16}),
    "gemma2": ("Gemma2", {**GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3", {**GEMMA, "sliding_window_pattern": 2}),
    "gemma3-capped": ("Gemma3", {**GEMMA, "sliding_window_pattern": 3, "final_logit_softcapping": 3.0}),
    "phi3": ("Phi3", {**LLAMA, "sliding_window": WINDOW}),
    "phi3-longrope": ("Phi3", {**LLAMA, "rope_parameters": LONGROPE, "original_max_position_embeddings": 10}),
    "phi3-partial": ("Phi3", {**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                          "partial_rotary_factor": 0.5}}),
}  # fmt: skip
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", BERT),
    "minilm": ("Bert", {**BERT, "hidden_size": 24, "num_attention_heads": 12, "num_hidden_layers": 2}),
    "roberta": ("Roberta", {**BERT, "max_position_embeddings": CONTEXT + 1, "type_vocab_size": 1}),
    "xlm-r": ("XLMRoberta", {**BERT, "max_position_embeddings": CONTEXT + 2, "pad_token_id": 1, "bos_token_id": 0}),
    "distilbert": ("DistilBert", DISTIL),
    "modernbert": ("ModernBert", MODERN),
    "modernbert-biases": ("ModernBert", {**MODERN, "norm_bias": True, "attention_bias": True, "mlp_bias": True,
                                         "classifier_pooling": "mean"}),
}  # fmt: skip
SEQ2SEQS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("T5ForConditionalGeneration", T5),
    "flan-t5": ("T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "mt5": ("MT5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "bart": ("BartForConditionalGeneration", SEQ2SEQ),
    "marian": ("MarianMTModel", {**SEQ2SEQ, "activation_function": "swish", "scale_embedding": True}),
    "original": ("MarianMTModel", {**SEQ2SEQ, "activation_function": "relu", "scale_embedding": True}),
}


def reference(class_name: str, config_name: str, options: dict[str, Any]) -> Any:
    """A randomly initialised network of `transformers`, every parameter drawn so that none is neutral."""
    config = getattr(transformers, config_name)(**options)
    torch.manual_seed(0)
    model = getattr(transformers, class_name)(config).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if config.model_type == "marian" and "embed_positions" in parameter_name:  # sinusoids
                continue
            if parameter.dim() == 1:
                parameter.copy_(parameter + 0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * (0.6 / parameter.size(1) ** 0.5))
        for name, buffer in model.named_buffers():
            if name == "final_logits_bias":
                buffer.copy_(torch.randn_like(buffer))
    return model


def ours_of(model: Any, folder: Path) -> Transformer:
    """The same network read from the folder that `transformers` writes."""
    model.save_pretrained(folder)
    config = read_config(json.loads((folder / "config.json").read_text()))
    return build(*take_over(config, load_file(folder / "model.safetensors")))


def reload(ours: Transformer, class_name: str, folder: Path) -> Any:
    """Our network as `transformers` reads it from what we write, nothing missing and nothing left over."""
    from hanmo.models.checkpoints.weights import write_safetensors

    folder.mkdir()
    special = {"pad_token_id": 0} if write_config(ours.config).get("pad_token_id") is None else {}
    (folder / "config.json").write_text(json.dumps({**write_config(ours.config), **special}))
    write_safetensors(folder / "model.safetensors", hand_over(ours.config, ours.state_dict()))
    model, info = getattr(transformers, class_name).from_pretrained(folder, output_loading_info=True)
    missing = [key for key in info["missing_keys"] if "pooler" not in key]  # BERT's base has one that we do not need
    assert not missing and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model.eval()


def config_class(family: str) -> str:
    return {"Gemma3": "Gemma3TextConfig"}.get(family, f"{family}Config")


def close(ours: Tensor, theirs: Tensor) -> None:
    """Within 1e-4 of the largest value."""
    assert ours.shape == theirs.shape
    scale = theirs.abs().max()
    assert scale > 0.01
    assert float((ours - theirs).abs().max() / scale) < 1e-4


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(3, V, (rows, length), generator=torch.Generator().manual_seed(length))


LENGTHS = (1, WINDOW - 1, WINDOW, WINDOW + 1, CONTEXT)


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_decoders_give_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    family, options = DECODERS[name]
    class_name = family + ("LMHeadModel" if family == "GPT2" else "ForCausalLM")
    theirs = reference(class_name, config_class(family), options)
    ours = ours_of(theirs, tmp_path / "theirs")
    assert num_parameters(ours.config) == sum(p.numel() for p in ours.parameters())
    for length in LENGTHS:
        close(ours(tokens(2, length)), theirs(tokens(2, length)).logits)
    again = reload(ours, class_name, tmp_path / "ours")
    close(ours(tokens(2, CONTEXT)), again(tokens(2, CONTEXT)).logits)


@pytest.mark.parametrize("name", [name for name in DECODERS if name != "phi3-longrope"])
@torch.no_grad()
def test_decoders_with_padding_and_cache(name: str, tmp_path: Path) -> None:
    """Left-padded rows, read in pieces into a cache, give the logits of `transformers` on the same rows."""
    family, options = DECODERS[name]
    class_name = family + ("LMHeadModel" if family == "GPT2" else "ForCausalLM")
    theirs = reference(class_name, config_class(family), options)
    ours = ours_of(theirs, tmp_path / "theirs")
    ids, mask = tokens(3, 18), torch.ones(3, 18, dtype=torch.bool)
    mask[1, :5], mask[2, :11] = False, False
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    expected = theirs(ids, attention_mask=mask.long(), position_ids=positions).logits
    close(ours(ids, mask_BS=mask)[mask], expected[mask])
    cache = KVCache(ours.config, 3, 18)
    pieces = [ours(ids[:, a:b], mask_BS=mask[:, :b], cache=cache) for a, b in ((0, 1), (1, 8), (8, 17), (17, 18))]
    close(torch.cat(pieces, dim=1)[mask], expected[mask])


@pytest.mark.parametrize("name", DECODERS)
@torch.no_grad()
def test_decoders_write_the_same_ids(name: str, tmp_path: Path) -> None:
    family, options = DECODERS[name]
    class_name = family + ("LMHeadModel" if family == "GPT2" else "ForCausalLM")
    theirs = reference(class_name, config_class(family), options)
    theirs.generation_config.eos_token_id = None
    ours = ours_of(theirs, tmp_path / "theirs")
    prompt = tokens(1, 4)
    expected = theirs.generate(prompt, do_sample=False, max_new_tokens=CONTEXT - 4, use_cache=False)[0].tolist()
    if name == "phi3-longrope":  # keys that were cached with the short factors stay so: no cache, then
        ids = prompt
        for _ in range(CONTEXT - 4):
            ids = torch.cat((ids, ours(ids)[:, -1:].argmax(-1)), dim=1)
        assert ids[0].tolist() == expected
        return
    cache, ids = KVCache(ours.config, 1, CONTEXT), prompt
    written, step = prompt[0].tolist(), prompt
    for _ in range(CONTEXT - 4):
        step = ours(step, cache=cache, last_only=True).argmax(-1)
        written.append(int(step))
    assert written == expected


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_masked_language_models_give_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    family, options = ENCODERS[name]
    theirs = reference(f"{family}ForMaskedLM", config_class(family), options)
    ours = ours_of(theirs, tmp_path / "theirs")
    assert task_of(ours.config) == "masked-lm"
    assert num_parameters(ours.config) == sum(p.numel() for p in ours.parameters())
    for length in LENGTHS:
        close(ours(tokens(2, length)), theirs(tokens(2, length)).logits)
    ids, mask = tokens(3, 17), torch.ones(3, 17, dtype=torch.bool)
    mask[1, 12:], mask[2, 1:] = False, False
    ids[~mask] = theirs.config.pad_token_id
    close(ours(ids, mask_BS=mask)[mask], theirs(ids, attention_mask=mask.long()).logits[mask])
    again = reload(ours, f"{family}ForMaskedLM", tmp_path / "ours")
    close(ours(ids, mask_BS=mask)[mask], again(ids, attention_mask=mask.long()).logits[mask])


ENCODER_TASKS = ("SequenceClassification", "TokenClassification", "QuestionAnswering")
CLASSIFIERS, TAGGERS = ("gpt2", "llama3", "qwen3", "mistral", "gemma3", "phi3"), ("gpt2", "llama3", "qwen2", "phi3")
HEADS = [
    *((name, ENCODERS[name][0], task) for name in ENCODERS for task in ENCODER_TASKS),
    *((name, DECODERS[name][0], "SequenceClassification") for name in CLASSIFIERS),
    *((name, DECODERS[name][0], "TokenClassification") for name in TAGGERS),
]


@pytest.mark.parametrize(("name", "family", "task"), HEADS)
@torch.no_grad()
def test_heads_give_the_scores_of_transformers(name: str, family: str, task: str, tmp_path: Path) -> None:
    options = {**(ENCODERS | DECODERS)[name][1]}
    if task != "QuestionAnswering":
        options["id2label"] = {0: "否", 1: "yes", 2: "maybe"}
    class_name = {"Gemma3": "Gemma3Text"}.get(family, family) + f"For{task}"
    theirs = reference(class_name, config_class(family), options)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = ours_of(theirs, tmp_path / "theirs")
    assert ours.config.head is not None
    assert num_parameters(ours.config) == sum(p.numel() for p in ours.parameters())
    ids, mask = tokens(3, 17), torch.ones(3, 17, dtype=torch.bool)
    mask[1, 12:], mask[2, 1:] = False, False
    ids[~mask] = theirs.config.pad_token_id or 0

    def compare(model: Any) -> None:
        found, out = ours(ids, mask_BS=mask), model(ids, attention_mask=mask.long())
        if task == "QuestionAnswering":
            close(found[mask], torch.stack((out.start_logits, out.end_logits), dim=-1)[mask])
        elif task == "TokenClassification":
            close(found[mask], out.logits[mask])
        else:
            close(found, out.logits)
            assert ours.config.head is not None
            assert ours.config.head.labels == ("否", "yes", "maybe")

    compare(theirs)
    compare(reload(ours, class_name, tmp_path / "ours"))


BASES = [name for name in (*ENCODERS, *DECODERS) if "-" not in name or name == "xlm-r"]


@pytest.mark.parametrize("name", BASES)
@torch.no_grad()
def test_base_models_give_the_states_of_transformers(name: str, tmp_path: Path) -> None:
    """Files without an output have names without the prefix; MiniLM's are such."""
    family, options = (ENCODERS | DECODERS)[name]
    class_name = {"Gemma3": "Gemma3Text"}.get(family, family) + "Model"
    theirs = reference(class_name, config_class(family), options)
    ours = ours_of(theirs, tmp_path / "theirs")
    assert task_of(ours.config) == "embedding"
    assert num_parameters(ours.config) == sum(p.numel() for p in ours.parameters())
    ids, mask = tokens(3, 17), torch.ones(3, 17, dtype=torch.bool)
    mask[1, 12:], mask[2, 1:] = False, False
    ids[~mask] = getattr(theirs.config, "pad_token_id", None) or 0
    expected = theirs(ids, attention_mask=mask.long()).last_hidden_state
    close(ours(ids, mask_BS=mask)[mask], expected[mask])
    again = reload(ours, class_name, tmp_path / "ours")
    close(again(ids, attention_mask=mask.long()).last_hidden_state[mask], expected[mask])


@pytest.mark.parametrize("name", SEQ2SEQS)
@torch.no_grad()
def test_encoder_decoders_give_the_logits_of_transformers(name: str, tmp_path: Path) -> None:
    class_name, options = SEQ2SEQS[name]
    family = class_name.removesuffix("ForConditionalGeneration").removesuffix("MTModel")
    theirs = reference(class_name, f"{family}Config", options)
    ours = ours_of(theirs, tmp_path / "theirs")
    assert num_parameters(ours.config) == sum(p.numel() for p in ours.parameters())
    again = reload(ours, class_name, tmp_path / "ours")
    for source_length, length in ((1, 1), (7, 1), (5, 9), (CONTEXT, CONTEXT)):
        source, ids = tokens(2, source_length), tokens(2, length)
        expected = theirs(input_ids=source, decoder_input_ids=ids).logits
        close(ours(ids, memory=ours.encode(source)), expected)
        close(again(input_ids=source, decoder_input_ids=ids).logits, expected)
    source, mask = tokens(3, 17), torch.ones(3, 17, dtype=torch.bool)
    mask[1, 12:], mask[2, 1:] = False, False
    ids = tokens(3, 9)
    expected = theirs(input_ids=source, attention_mask=mask.long(), decoder_input_ids=ids).logits
    memory, cache = ours.encode(source, mask_BS=mask), KVCache(ours.config, 3, 9)
    close(ours(ids, memory=memory), expected)
    pieces = [ours(ids[:, a:b], memory=memory, cache=cache) for a, b in ((0, 1), (1, 6), (6, 9))]
    close(torch.cat(pieces, dim=1), expected)


@torch.no_grad()
def test_t5_with_an_output_of_its_own(tmp_path: Path) -> None:
    """FLAN-T5's files hold `lm_head` beside the shared embedding."""
    theirs = reference("T5ForConditionalGeneration", "T5Config", SEQ2SEQS["flan-t5"][1])
    theirs.lm_head.weight = torch.nn.Parameter(torch.randn_like(theirs.shared.weight) * 0.1)
    ours = ours_of(theirs, tmp_path / "theirs")
    assert not ours.config.tie_embeddings
    source, ids = tokens(2, 7), tokens(2, 5)
    expected = theirs(input_ids=source, decoder_input_ids=ids).logits
    close(ours(ids, memory=ours.encode(source)), expected)
    again = reload(ours, "T5ForConditionalGeneration", tmp_path / "ours")
    close(again(input_ids=source, decoder_input_ids=ids).logits, expected)


@pytest.mark.parametrize("name", SEQ2SEQS)
@torch.no_grad()
def test_encoder_decoders_write_the_same_ids(name: str, tmp_path: Path) -> None:
    class_name, options = SEQ2SEQS[name]
    family = class_name.removesuffix("ForConditionalGeneration").removesuffix("MTModel")
    theirs = reference(class_name, f"{family}Config", options)
    theirs.generation_config.eos_token_id = None
    ours = ours_of(theirs, tmp_path / "theirs")
    source = tokens(1, 9)
    expected = theirs.generate(source, do_sample=False, num_beams=1, max_new_tokens=12)[0].tolist()
    memory, cache = ours.encode(source), KVCache(ours.config, 1, CONTEXT)
    written, step = [0], torch.tensor([[0]])
    for _ in range(12):
        step = ours(step, memory=memory, cache=cache, last_only=True).argmax(-1)
        written.append(int(step))
    assert written == expected


def test_the_original_transformer_is_built_and_exported(tmp_path: Path) -> None:
    config = original_transformer(V, 32, 2, 4, 64)
    assert (config.positions, config.norm_placement, config.activation) == ("sinusoidal", "post", "relu")
    model = Transformer(config)
    model.initialize(0)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.normal_(parameter, std=0.1)
    theirs = reload(model.eval(), "MarianMTModel", tmp_path / "ours")
    source, ids = tokens(2, 7), tokens(2, 5)
    with torch.no_grad():
        close(model(ids, memory=model.encode(source)), theirs(input_ids=source, decoder_input_ids=ids).logits)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_architecture_survives_its_configuration(model_type: str) -> None:
    tables = {**DECODERS, **ENCODERS, **SEQ2SEQS}
    for class_name, options in tables.values():
        family = class_name.removesuffix("ForConditionalGeneration").removesuffix("MTModel")
        raw = getattr(transformers, config_class(family))(**options).to_dict()
        if raw["model_type"] == model_type:
            config = read_config(raw)
            assert read_config(write_config(config)) == config
            break
    else:
        raise AssertionError(f"no example of {model_type}")


def test_a_head_is_put_on_any_encoder() -> None:
    base = read_config({**transformers.BertConfig(**BERT).to_dict(), "architectures": ["BertModel"]})
    assert task_of(base) == "embedding"
    head = default_head(base, "token-classification", ("O", "B-人", "I-人"), crf=True)
    config = with_head(base, head)
    assert read_config(write_config(config)) == config
    model = Transformer(config)
    assert num_parameters(config) == sum(p.numel() for p in model.parameters())
    assert model(tokens(2, 5)).shape == (2, 5, 3)


def test_what_an_architecture_cannot_express_is_not_written() -> None:
    config = dataclasses.replace(read_config(transformers.LlamaConfig(**LLAMA).to_dict()), qk_norm=True)
    with pytest.raises(ModelError, match="the architecture llama cannot express qk_norm = True"):
        write_config(config)
    encoder = dataclasses.replace(config, qk_norm=False, causal=False)
    with pytest.raises(ModelError, match="llama has no form for masked-lm"):
        write_config(encoder)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tie_word_embeddings": False}, "tie_word_embeddings = False"),
        ({"model_type": "bert", "position_embedding_type": "relative_key"}, "position_embedding_type = 'relative_key'"),
        ({"architectures": ["BertForNextSentencePrediction"]}, "'BertForNextSentencePrediction' .* is not known"),
        ({"hidden_act": "mish"}, "the activation 'mish' is not known"),
    ],
)
def test_unknown_variants_are_refused(options: dict[str, Any], message: str) -> None:
    raw = transformers.BertConfig(**BERT).to_dict()
    with pytest.raises(ModelError, match=message):
        read_config({**raw, **options})


def test_a_damaged_file_is_named_in_its_own_words() -> None:
    config = read_config(transformers.GPT2Config(**GPT2).to_dict())
    model = Transformer(config)
    model.initialize(0)
    whole = hand_over(config, model.state_dict())

    def refused(change: dict[str, Tensor | None]) -> str:
        changed = {**whole, **change}
        with pytest.raises(ModelError) as caught:
            take_over(config, {name: tensor for name, tensor in changed.items() if tensor is not None})
        return caught.value.what

    name = "transformer.h.1.attn.c_attn.weight"
    assert refused({name: None}) == f"1 tensors are missing, the first is '{name}' (32, 96)"
    assert refused({name: torch.zeros(96, 32)}) == f"the tensor '{name}' has shape (96, 32), expected (32, 96)"
    assert refused({name: torch.full((32, 96), torch.nan)}) == f"the tensor '{name}' holds NaN or infinite values"
    assert "'transformer.h.9.x'" in refused({"transformer.h.9.x": torch.zeros(1)})


def test_flops_of_sliding_and_bidirectional_layers() -> None:
    """Against torch's own counter, which counts every score, seen or not."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    raw = transformers.BertConfig(**BERT).to_dict()
    config = read_config(raw)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        Transformer(config)(tokens(1, 20))
    assert counter.get_total_flops() == 20 * forward_flops_per_token(config, 20)
    sliding = TransformerConfig(V, 32, 2, 4, 4, 8, 48, 64, sliding_window=4, sliding_layers=(True, False))
    full = dataclasses.replace(sliding, sliding_window=None, sliding_layers=None)
    saved = forward_flops_per_token(full, 40) - forward_flops_per_token(sliding, 40)
    assert saved == 4 * 32 * (20 - 4)
