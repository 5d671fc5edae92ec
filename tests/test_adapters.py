"""Low-rank adapters, their files beside the real `peft`, and the choice of what is trained."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hanmo.errors import ModelError, UsageError
from hanmo.folder import read_json, verify
from hanmo.models.adapters import (
    LoraConfig,
    LoraLinear,
    adapter_config,
    adapter_names,
    adapter_parameters,
    adapters_off,
    add_adapter,
    base_state,
    load_adapter,
    merge,
    remove_adapter,
    save_adapter,
    set_active,
    train_adapter,
    train_only,
    trainable_parameters,
    weights_fingerprint,
)
from hanmo.models.architectures import default_head, hand_over, read_config, take_over, with_head
from hanmo.models.transformer import Transformer, TransformerConfig, build

V = 61
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {
    **{"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48},
    **{"max_position_embeddings": 24, **IDS},
}
LLAMA = {**SIZES, "num_key_value_heads": 2}
T5 = {
    **{"vocab_size": V, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, **IDS},
    **{"n_positions": 24, "decoder_start_token_id": 0, "feed_forward_proj": "gated-gelu"},
}
GPT2 = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 24, **IDS}
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", LLAMA),
    "llama-tied": ("LlamaForCausalLM", "LlamaConfig", {**LLAMA, "tie_word_embeddings": True}),
    "llama-base": ("LlamaModel", "LlamaConfig", LLAMA),
    "llama-classifier": ("LlamaForSequenceClassification", "LlamaConfig", {**LLAMA, "num_labels": 3}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**LLAMA, "head_dim": 16}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "gpt2-base": ("GPT2Model", "GPT2Config", GPT2),
    "phi3": ("Phi3ForCausalLM", "Phi3Config", LLAMA),
    "bert": ("BertForMaskedLM", "BertConfig", SIZES),
    "bert-base": ("BertModel", "BertConfig", SIZES),
    "bert-classifier": ("BertForSequenceClassification", "BertConfig", {**SIZES, "num_labels": 3}),
    "bert-tagger": ("BertForTokenClassification", "BertConfig", {**SIZES, "num_labels": 5}),
    "roberta-classifier": ("RobertaForSequenceClassification", "RobertaConfig",
                           {**SIZES, "max_position_embeddings": 25, "num_labels": 3}),
    "distilbert": ("DistilBertForMaskedLM", "DistilBertConfig",
                   {"vocab_size": V, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}),
    "modernbert": ("ModernBertForMaskedLM", "ModernBertConfig",
                   {**SIZES, "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2}),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", {**LLAMA, "head_dim": 8, "query_pre_attn_scalar": 8}),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5),
}  # fmt: skip


def theirs_of(kind: str, seed: int = 0) -> Any:
    """A network of `transformers` with random weights, none of them neutral."""
    class_name, config_name, options = KINDS[kind]
    torch.manual_seed(seed)
    model = getattr(transformers, class_name)(getattr(transformers, config_name)(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.2 * torch.randn_like(parameter)
            else:
                parameter.copy_(torch.randn_like(parameter) * (0.6 / parameter.size(1) ** 0.5))
    return model


def ours_of(model: Any, folder: Path) -> Transformer:
    """The same network as ours, read from what `transformers` writes; the values are not shared."""
    model.save_pretrained(folder)
    config = read_config(json.loads((folder / "config.json").read_text()))
    config, state = take_over(config, load_file(folder / "model.safetensors"))
    return build(config, {name: tensor.clone() for name, tensor in state.items()})


def tiny(tied: bool = False, **options: Any) -> Transformer:
    """A network of ours."""
    model = Transformer(TransformerConfig(V, 16, 2, 4, 2, 4, 24, 32, tie_embeddings=tied, **options))
    randomize(model, 1)
    return model.eval()


@torch.no_grad()
def randomize(model: nn.Module, seed: int, only: Callable[[str], bool] = lambda name: True) -> None:  # noqa: ARG005
    """Draw parameters anew."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if only(name):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


@torch.no_grad()
def stir(model: nn.Module, name: str, seed: int = 5) -> None:
    """Give an adapter values that change the outputs: also DoRA's lengths and the modules trained fully."""
    generator = torch.Generator().manual_seed(seed)
    for at, parameter in adapter_parameters(model, name).items():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        parameter.add_(noise * (0.2 if "lora_" in at else 0.1))


def tokens(length: int = 11) -> Tensor:
    return torch.randint(3, V, (2, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def our_scores(model: Transformer) -> Tensor:
    if model.config.encoder:
        return model(tokens(7), memory=model.encode(tokens(9)))
    return model(tokens())


@torch.no_grad()
def their_scores(model: Any) -> Tensor:
    if getattr(model.config, "is_encoder_decoder", False):
        return model(input_ids=tokens(9), decoder_input_ids=tokens(7)).logits  # type: ignore[no-any-return]
    out = model(tokens())
    return out.logits if hasattr(out, "logits") else out.last_hidden_state  # type: ignore[no-any-return]


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    """Within a hundred-thousandth of the largest value."""
    assert ours.shape == theirs.shape
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < tolerance


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# Parity with peft ----------------------------------------------------------------------------------------------------

LORA, DORA, STABLE = LoraConfig(4, 6.0), LoraConfig(3, 5.0, dora=True), LoraConfig(4, 6.0, rslora=True)
PARTLY = LoraConfig(3, 5.0, targets=("q_proj", "v_proj"))
OUT = [
    *((kind, LORA) for kind in KINDS),
    *((kind, DORA) for kind in ("llama", "gpt2", "phi3", "bert", "t5")),
    *((kind, STABLE) for kind in ("llama", "gpt2", "phi3")),
    *((kind, PARTLY) for kind in ("llama", "gpt2", "phi3", "bert", "modernbert")),
    ("gpt2", dataclasses.replace(PARTLY, dora=True)),
    ("gpt2", dataclasses.replace(PARTLY, rslora=True)),
    ("gpt2", LoraConfig(2, 3.0, targets=("model.layers.1.self_attn.k_proj", "0.mlp.up_proj"))),
    ("qwen3", LoraConfig(2, 3.0, targets=("model.layers.1.self_attn.k_proj", "down_proj"))),
    ("llama-classifier", LoraConfig(4, 6.0, modules_to_save=("head",))),
    ("bert-classifier", LoraConfig(4, 6.0, modules_to_save=("head",))),
    ("bert-classifier", LoraConfig(4, 6.0, targets=("head.transform.dense", "q_proj"))),
    ("bert-tagger", LoraConfig(4, 6.0, modules_to_save=("head",))),
    ("roberta-classifier", LoraConfig(4, 6.0, modules_to_save=("head",))),
    ("llama", LoraConfig(4, 6.0, targets=("q_proj", "lm_head"))),
    ("llama", LoraConfig(4, 6.0, modules_to_save=("embed_tokens", "lm_head", "model.norm"))),
    ("llama-tied", LoraConfig(4, 6.0, modules_to_save=("embed_tokens",))),
    ("gpt2", LoraConfig(4, 6.0, targets=("mlp",), modules_to_save=("embed_tokens", "layers.1.self_attn"))),
    ("bert", LoraConfig(4, 6.0, modules_to_save=("embed_tokens",))),
    ("modernbert", LoraConfig(4, 6.0, modules_to_save=("embed_tokens",))),
    ("t5", LoraConfig(4, 6.0, targets="attention", modules_to_save=("embed_tokens",))),
]


@pytest.mark.parametrize(("kind", "config"), OUT)
def test_peft_reads_what_we_write(kind: str, config: LoraConfig, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'hanmo[test]'")
    theirs = theirs_of(kind)
    ours = ours_of(theirs, tmp_path / "base")
    plain = our_scores(ours)
    add_adapter(ours, "zh", config, seed=3)
    assert torch.equal(our_scores(ours), plain) or config.dora  # whose lengths may round
    close(our_scores(ours), plain)
    stir(ours, "zh")
    expected = our_scores(ours)
    assert float((expected - plain).abs().max() / plain.abs().max()) > 0.01
    save_adapter(tmp_path / "adapter", ours, "zh", base=str(tmp_path / "base"))
    with quiet():
        wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter").eval()
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    with quiet():
        read = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    assert stored.keys() <= read.keys()
    for name in read.keys() - stored.keys():  # modules that peft always takes as trained beside a classifier
        assert (
            name.endswith(("classifier.weight", "classifier.bias", "score.weight", "decoder.bias"))
            or "classifier" in name
        )
    close(their_scores(wrapped), expected)
    again = ours_of_folder(tmp_path / "base")
    loaded = load_adapter(tmp_path / "adapter", again)
    assert loaded.config == config
    assert torch.equal(our_scores(again), expected)
    own, copy = adapter_parameters(ours, "zh"), adapter_parameters(again, "adapter")
    assert [name.replace(".zh.", ".adapter.") for name in own] == list(copy)
    assert all(torch.equal(a, b) for a, b in zip(own.values(), copy.values(), strict=True))


def ours_of_folder(folder: Path) -> Transformer:
    config = read_config(json.loads((folder / "config.json").read_text()))
    return build(*take_over(config, load_file(folder / "model.safetensors")))


IN: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": ["q_proj", "up_proj"], "use_dora": True}),
    ("llama", {"target_modules": ["q_proj", "v_proj"], "use_rslora": True}),
    ("llama", {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 5, "layers.1.self_attn.q_proj": 2},
               "alpha_pattern": {".*0.self_attn.q_proj": 9}}),
    ("llama", {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]}),
    ("llama", {"target_modules": ["q_proj", "o_proj", "lm_head"], "exclude_modules": ["layers.0.self_attn.o_proj"]}),
    ("llama", {"target_modules": r".*\.(q|k)_proj"}),
    ("llama", {"target_modules": ["k_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}),
    ("llama-tied", {"target_modules": ["k_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    ("llama-base", {"target_modules": ["k_proj"]}),
    ("llama-classifier", {"target_modules": ["k_proj"], "task_type": "SEQ_CLS"}),
    ("qwen3", {"target_modules": ["q_proj", "k_proj", "gate_proj"]}),
    ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True, "use_dora": True}),
    ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_rslora": True}),
    ("gpt2-base", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj", "down_proj"]}),
    ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"], "use_dora": True}),
    ("bert", {"target_modules": ["query", "dense"], "exclude_modules": ["transform.dense"]}),
    ("bert", {"target_modules": ["query"], "use_dora": True}),
    ("bert-base", {"target_modules": ["query", "value"]}),
    ("bert-classifier", {"target_modules": ["query"], "task_type": "SEQ_CLS"}),
    ("bert-tagger", {"target_modules": ["query"], "task_type": "TOKEN_CLS"}),
    ("roberta-classifier", {"target_modules": ["value"], "task_type": "SEQ_CLS"}),
    ("modernbert", {"target_modules": ["Wqkv", "Wi"]}),
    ("t5", {"target_modules": ["q", "v", "wi_0"]}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "options"), IN)
def test_we_read_what_peft_writes(kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'hanmo[test]'")
    theirs = theirs_of(kind)
    ours = ours_of(theirs, tmp_path / "base")
    plain = our_scores(ours)
    torch.manual_seed(4)
    with quiet():
        wrapped = peft.get_peft_model(theirs, peft.LoraConfig(**{"r": 4, "lora_alpha": 7, **options})).eval()
        with torch.no_grad():
            for name, parameter in wrapped.named_parameters():
                if parameter.requires_grad:
                    parameter += torch.randn_like(parameter) * (0.2 if "lora_" in name else 0.1)
        wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    expected = their_scores(wrapped)
    loaded = load_adapter(tmp_path / "adapter", ours)
    assert loaded.name == "adapter"
    assert loaded.config.dora == options.get("use_dora", False)
    assert not trainable_parameters(ours).keys() & adapter_parameters(ours, "adapter").keys()
    close(our_scores(ours), expected)
    assert float((expected - plain).abs().max() / plain.abs().max()) > 0.01
    # and out again: peft computes the same from our folder, in the same number of tensors of the same size
    save_adapter(tmp_path / "again", ours, "adapter")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    with quiet():
        fresh = peft.PeftModel.from_pretrained(theirs_of(kind), tmp_path / "again").eval()
    close(their_scores(fresh), expected)


# The layer -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [LORA, STABLE, DORA])
def test_the_layer_computes_the_formula_and_its_gradients(config: LoraConfig) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5)).double()
    add_adapter(model, "a", dataclasses.replace(config, targets=("0",)))
    stir(model, "a")
    layer, x = model[0], torch.randn(3, 7, dtype=torch.float64)
    assert isinstance(layer, LoraLinear)
    own = layer.adapter("a")
    a, b, w = own.lora_A, own.lora_B, layer.base.weight
    scale = config.alpha / (config.rank**0.5 if config.rslora else config.rank)
    merged = w + scale * b @ a
    if own.magnitude is not None:
        merged = merged * (own.magnitude / merged.detach().norm(dim=1)).unsqueeze(1)
    expected = x @ merged.T + layer.base.bias
    assert torch.allclose(layer(x), expected, rtol=1e-12)
    assert torch.allclose(layer.weight, merged, rtol=1e-12)
    parameters = list(adapter_parameters(model, "a").values())
    weights = torch.randn_like(expected)
    for found, right in zip(
        torch.autograd.grad((layer(x) * weights).sum(), parameters),
        torch.autograd.grad((expected * weights).sum(), parameters),
        strict=True,
    ):
        assert torch.allclose(found, right, rtol=1e-10)


def test_dropout_only_in_training_and_only_before_the_low_rank_product() -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    add_adapter(model, "a", LoraConfig(2, 2.0, dropout=0.5, targets=("0",)))
    x = torch.ones(1, 6)
    model.train()
    assert torch.equal(model(x), model[0].base(x))  # type: ignore[union-attr]
    stir(model, "a")
    torch.manual_seed(0)
    outputs = {tuple(model(x)[0].tolist()) for _ in range(8)}
    assert len(outputs) > 1
    model.eval()
    assert torch.equal(model(x), model(x))


def test_half_precision_layers_keep_their_adapters_in_float32() -> None:
    model = nn.Sequential(nn.Linear(6, 4)).bfloat16()
    add_adapter(model, "a", LoraConfig(2, 2.0, targets=("0",), dora=True))
    stir(model, "a")
    assert {parameter.dtype for parameter in adapter_parameters(model, "a").values()} == {torch.float32}
    x = torch.ones(2, 6, dtype=torch.bfloat16)
    assert model(x).dtype == torch.bfloat16
    expected = model(x).float()
    merge(model)
    assert model[0].weight.dtype == torch.bfloat16
    assert torch.allclose(model(x).float(), expected, atol=0.05)


def test_matrices_depend_on_the_seed_and_the_name_of_the_layer_alone() -> None:
    few, many, other = tiny(), tiny(), tiny()
    add_adapter(few, "a", LoraConfig(2, targets=("layers.1.mlp.up_proj",)), seed=9)
    add_adapter(many, "b", LoraConfig(2), seed=9)
    add_adapter(other, "a", LoraConfig(2), seed=10)
    at = "model.layers.1.mlp.up_proj"
    a, b, c = (model.get_submodule(at).adapters[n].lora_A for model, n in ((few, "a"), (many, "b"), (other, "a")))  # type: ignore[index,union-attr]
    assert torch.equal(a, b)  # type: ignore[arg-type]
    assert not torch.equal(a, c)  # type: ignore[arg-type]
    drawn = torch.cat([p.flatten() for n, p in adapter_parameters(many, "b").items() if n.endswith("lora_A")])
    assert float(drawn.detach().abs().max()) <= 16**-0.5


# On a network --------------------------------------------------------------------------------------------------------


def test_gradients_reach_the_adapter_and_nothing_else() -> None:
    model = tiny().train()
    total = sum(parameter.numel() for parameter in model.parameters())
    config = LoraConfig(2, targets=("q_proj", "mlp"), modules_to_save=("lm_head",))
    count = add_adapter(model, "a", config)
    assert adapter_config(model, "a") == config
    own = adapter_parameters(model, "a")
    matrices = 2 * (2 * (16 + 16) + 3 * 2 * (16 + 24))
    assert count == sum(parameter.numel() for parameter in own.values()) == matrices + V * 16
    assert trainable_parameters(model).keys() == own.keys()
    assert total + count == sum(parameter.numel() for parameter in model.parameters())
    stir(model, "a")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.loss(tokens(), tokens(12)[:, 1:]).backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in own), name
        assert torch.equal(parameter, before[name]) == (name not in own), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dora", [False, True])
def test_merging_gives_the_outputs_of_the_adapter_in_a_plain_network(tied: bool, dora: bool) -> None:
    model = tiny(tied)
    config = model.config
    targets = ("all-linear",) if tied else ("all-linear", "lm_head")
    add_adapter(model, "a", LoraConfig(3, 4.0, targets=targets, dora=dora, modules_to_save=("embed_tokens", "norm")))
    stir(model, "a")
    expected = our_scores(model)
    merge(model)
    close(our_scores(model), expected)
    plain = Transformer(config)
    plain.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(our_scores(plain.eval()), our_scores(model))
    assert adapter_names(model) == []


def test_merging_chosen_adapters_drops_the_others() -> None:
    model = tiny()
    for seed, name in enumerate("ab"):
        add_adapter(model, name, LoraConfig(2), seed)
        stir(model, name, seed)
    set_active(model, {"a": 0.5, "b": 1.0})
    set_active(model, {"a": 0.5})
    expected = our_scores(model)
    merge(model, ["a"])
    close(our_scores(model), expected)
    assert adapter_names(model) == []
    with pytest.raises(UsageError, match="no adapter to merge"):
        merge(model)


def test_a_merge_that_would_break_the_weights_changes_nothing() -> None:
    model = tiny()
    add_adapter(model, "a", LoraConfig(2))
    before = weights_fingerprint(model)
    with torch.no_grad():
        adapter_parameters(model, "a")["model.layers.1.mlp.up_proj.adapters.a.lora_B"].fill_(float("inf"))
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj.*nothing was merged"):
        merge(model)
    assert adapter_names(model) == ["a"]
    assert weights_fingerprint(model) == before


def test_several_adapters_add_up_with_their_weights() -> None:
    """Measured on one layer, where the sum of changes is the change of the sum."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5))
    x = torch.randn(4, 6)
    plain = model(x)
    changes = {}
    for seed, (name, config) in enumerate({"a": LORA, "b": STABLE, "c": DORA}.items()):
        add_adapter(model, name, dataclasses.replace(config, targets=("0",)), seed)
        stir(model, name, seed)
        changes[name] = model(x) - plain
    assert adapter_names(model) == ["a", "b", "c"]
    weights = {"a": 0.5, "b": -2.0, "c": 0.25}
    set_active(model, weights)
    expected = plain + sum(weight * changes[name] for name, weight in weights.items())
    assert torch.allclose(model(x), expected, atol=1e-5)
    with adapters_off(model):
        assert torch.equal(model(x), plain)
    assert torch.allclose(model(x), expected, atol=1e-5)
    remove_adapter(model, "b")
    assert torch.allclose(model(x), expected + 2.0 * changes["b"], atol=1e-5)
    merge(model)
    assert isinstance(model[0], nn.Linear)
    assert torch.allclose(model(x), expected + 2.0 * changes["b"], atol=1e-5)


def test_removing_the_last_adapter_leaves_the_network_as_it_was() -> None:
    model = tiny()
    plain, names = our_scores(model), list(model.state_dict())
    for name in "ab":
        add_adapter(model, name, LoraConfig(2, modules_to_save=("embed_tokens",)))
        stir(model, name)
    assert list(base_state(model)) and base_state(model).keys() == set(names)
    remove_adapter(model, "a")
    remove_adapter(model, "b")
    assert list(model.state_dict()) == names
    assert torch.equal(our_scores(model), plain)


def test_the_base_of_an_adapted_network_is_saved_as_a_plain_one(tmp_path: Path) -> None:
    model = ours_of(theirs_of("gpt2"), tmp_path)
    before = hand_over(model.config, model.state_dict())
    add_adapter(model, "a", LoraConfig(2, modules_to_save=("embed_tokens",)))
    stir(model, "a")
    after = hand_over(model.config, base_state(model))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_training_goes_on_with_one_of_two_adapters() -> None:
    model = tiny()
    add_adapter(model, "a", LoraConfig(2))
    add_adapter(model, "b", LoraConfig(2))
    assert all(".adapters.b." in name for name in trainable_parameters(model))
    train_adapter(model, "a")
    assert all(".adapters.a." in name for name in trainable_parameters(model))


BAD_CONFIGS = [
    ({"rank": 0}, "rank of an adapter is a whole number"),
    ({"rank": True}, "rank"),
    ({"rank": 2.5}, "rank"),
    ({"alpha": 0}, "alpha of an adapter is a number above 0"),
    ({"alpha": float("nan")}, "alpha"),
    ({"dropout": 1.0}, "dropout"),
    ({"targets": ()}, "targets"),
    ({"targets": ("",)}, "targets"),
    ({"dora": "yes"}, "dora"),
]


@pytest.mark.parametrize(("fields", "message"), BAD_CONFIGS)
def test_configurations_no_adapter_can_have(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        LoraConfig(**fields)


BAD_TARGETS = [
    (LoraConfig(targets=("q_porj",)), "did you mean 'q_proj'"),
    (LoraConfig(targets=("q_proj", "embed_tokens")), "is a Embedding|is an? Embedding"),
    (LoraConfig(targets=("lm_head",)), "no linear layer"),
    (LoraConfig(modules_to_save=("haed",)), "known: |did you mean"),
    (LoraConfig(targets=("q_proj",), modules_to_save=("self_attn",)), "no linear layer"),
]


@pytest.mark.parametrize(("config", "message"), BAD_TARGETS)
def test_targets_that_do_not_exist(config: LoraConfig, message: str) -> None:
    model = tiny(tied=True)
    names = list(model.state_dict())
    with pytest.raises(UsageError) as caught:
        add_adapter(model, "a", config)
    assert any(part in str(caught.value) for part in message.split("|"))
    assert list(model.state_dict()) == names


def test_names_of_adapters() -> None:
    model = tiny()
    add_adapter(model, "金融-2", LoraConfig(2))
    for name, message in (("金融-2", "already"), ("a.b", "cannot be called"), ("", "cannot"), ("train", "cannot")):
        with pytest.raises(UsageError, match=message):
            add_adapter(model, name, LoraConfig(2))
    for call in (remove_adapter, adapter_config, adapter_parameters, train_adapter):
        with pytest.raises(UsageError, match=r"no adapter '金融'[\s\S]*did you mean '金融-2'"):
            call(model, "金融")
    with pytest.raises(UsageError, match="weight of the adapter"):
        set_active(model, {"金融-2": float("nan")})


def test_two_copies_of_one_module_cannot_both_be_used() -> None:
    model = tiny()
    for name in "ab":
        add_adapter(model, name, LoraConfig(2, modules_to_save=("lm_head",)))
    with pytest.raises(UsageError, match="both have their own 'lm_head'"):
        set_active(model, {"a": 1.0, "b": 1.0})
    with pytest.raises(UsageError, match="cannot be trained fully"):
        add_adapter(model, "c", LoraConfig(2, modules_to_save=("mlp",)))


# Files ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter of ours on :func:`tiny`, with provenance."""
    model = tiny()
    add_adapter(model, "a", LoraConfig(2, 3.0), seed=1)
    stir(model, "a")
    save_adapter(tmp_path / "适配器", model, "a", base="org/base", provenance={"metrics": {"loss": 1.5}})
    return tmp_path / "适配器"


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None], file: str = "adapter_config.json") -> None:
    """Change a file of a folder as another tool would, which leaves no manifest of ours."""
    (folder / "hanmo.json").unlink(missing_ok=True)
    if file.endswith(".json"):
        value = json.loads((folder / file).read_text())
        change(value)
        (folder / file).write_text(json.dumps(value))
        return
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)


def test_the_folder_is_sealed_and_tells_where_it_comes_from(folder: Path) -> None:
    manifest = verify(folder)
    assert manifest["metrics"] == {"loss": 1.5}
    assert manifest["adapter"]["base"]["name"] == "org/base"
    assert manifest["adapter"]["base"]["fingerprint"] == weights_fingerprint(tiny())
    assert set(manifest["files"]) == {"adapter_config.json", "adapter_model.safetensors"}
    raw = read_json(folder / "adapter_config.json")
    assert raw["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    assert (raw["r"], raw["lora_alpha"], raw["task_type"]) == (2, 3, "CAUSAL_LM")
    model = tiny()
    loaded = load_adapter(folder, model, trainable=True)
    assert (loaded.name, loaded.base, loaded.provenance) == ("适配器", "org/base", {"metrics": {"loss": 1.5}})
    assert trainable_parameters(model).keys() == adapter_parameters(model, "适配器").keys()
    with pytest.raises(UsageError, match="already"):
        load_adapter(folder, model)
    load_adapter(folder, model, "second")
    assert adapter_names(model) == ["适配器", "second"]


def test_another_base_with_the_same_shapes_is_found_by_its_weights(folder: Path) -> None:
    other = tiny()
    randomize(other, 2)
    with pytest.raises(ModelError) as caught:
        load_adapter(folder, other, base="org/other")
    assert "trained on other weights" in str(caught.value)
    assert "'org/base'" in str(caught.value) and "'org/other', llama with 2 layers of size 16" in str(caught.value)
    assert adapter_names(other) == []


def test_another_name_with_fitting_shapes_is_only_a_notice(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load_adapter(folder, tiny(), base="/models/renamed")
    assert capsys.readouterr().err == ""  # the weights are the same
    rewrite(folder, dict.copy)
    load_adapter(folder, tiny(), base="/models/renamed")
    assert "made for 'org/base' and is used with '/models/renamed'" in capsys.readouterr().err
    load_adapter(folder, tiny(), base="org/base")
    assert capsys.readouterr().err == ""


OTHERS = [
    (lambda: Transformer(TransformerConfig(V, 32, 2, 4, 2, 8, 24, 32, tie_embeddings=False)), "has shape"),
    (lambda: Transformer(TransformerConfig(V, 16, 3, 4, 2, 4, 24, 32, tie_embeddings=False)), "are missing"),
    (lambda: Transformer(TransformerConfig(V, 16, 1, 4, 2, 4, 24, 32, tie_embeddings=False)), "do not belong"),
]


@pytest.mark.parametrize(("make", "message"), OTHERS)
@pytest.mark.parametrize("sealed", [True, False])
def test_an_adapter_for_another_network(
    make: Callable[[], Transformer], message: str, sealed: bool, folder: Path
) -> None:
    if not sealed:
        rewrite(folder, dict.copy)
    model = make()
    with pytest.raises(ModelError) as caught:
        load_adapter(folder, model, base="org/other")
    assert "the adapter does not fit this network" in str(caught.value) and message in str(caught.value)
    assert "made for 'org/base'; this one is 'org/other', llama with" in str(caught.value)
    assert adapter_names(model) == []


def test_an_adapter_of_another_architecture(folder: Path, tmp_path: Path) -> None:
    model = ours_of(theirs_of("gpt2"), tmp_path / "gpt2")
    with pytest.raises(ModelError, match=r"does not fit[\s\S]*gpt2 with 2 layers"):
        load_adapter(folder, model)


def put(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda raw: raw.__setitem__(key, value)


BAD_RAW = [
    (put("peft_type", "IA3"), "of the kind 'IA3'"),
    (lambda raw: raw.pop("peft_type"), "does not say what kind"),
    (put("r", 0), "rank"),
    (put("r", 10**9), "has shape"),
    (put("lora_alpha", "8"), "alpha"),
    (put("lora_alpha", -1), "alpha"),
    (put("bias", "all"), "bias = 'all'"),
    (put("use_qalora", True), "use_qalora"),
    (put("use_dora", "no"), "true or false"),
    (put("use_dora", True), "tensors are missing.*lora_magnitude_vector"),
    (put("init_lora_weights", "pissa"), "init_lora_weights = 'pissa'"),
    (put("layer_replication", [[0, 1]]), "layer_replication"),
    (put("from_the_future", {"x": 1}), "from_the_future"),
    (put("target_modules", [1]), "target_modules is a list of names"),
    (put("target_modules", ["q_proj", "lm_head"]), "lm_head.lora_A"),
    (put("modules_to_save", 3), "modules_to_save"),
    (put("layers_to_transform", ["1"]), "layers_to_transform"),
    (put("rank_pattern", {"q_proj": 0}), "no positive number"),
    (put("rank_pattern", {"(": 1}), "no usable pattern"),
    (put("rank_pattern", {"(a+)+$": 1}), "no usable pattern"),
    (put("rank_pattern", {".*" * 40: 1}), "no usable pattern"),
    (put("rank_pattern", [1]), "not a JSON object"),
    (put("rank_pattern", {"q_proj": 3}), "has shape"),
]


@pytest.mark.parametrize(("change", "message"), BAD_RAW)
def test_configurations_that_cannot_be_used(
    change: Callable[[dict[str, Any]], None], message: str, folder: Path
) -> None:
    rewrite(folder, change)
    model = tiny()
    with pytest.raises(ModelError, match=message) as caught:
        load_adapter(folder, model)
    assert str(folder) in caught.value.where
    assert caught.value.zh
    assert adapter_names(model) == []


Q = "base_model.model.model.layers.1.self_attn.q_proj."
BAD_TENSORS = [
    (lambda given: given.pop(Q + "lora_B.weight"), "missing.*q_proj.lora_B"),
    (lambda given: [given.pop(Q + f"lora_{x}.weight") for x in "AB"], "missing.*q_proj.lora_A"),
    (put("base_model.model.model.layers.1.self_attn.x_proj.lora_A.weight", torch.ones(2, 16)), "do not belong.*x_proj"),
    (put("base_model.model.model.embed_tokens.lora_embedding_A", torch.ones(2, V)), "low-rank change of an embedding"),
    (put("base_model.model.model.layers.1.mlp.up_proj.bias", torch.ones(24)), "do not belong.*up_proj.bias"),
    (put(Q + "lora_A.weight", torch.full((2, 16), float("nan"))), "NaN"),
    (put(Q + "lora_A.weight", torch.ones(2, 16, dtype=torch.int32)), "not a weight type"),
    (put(Q + "lora_A.weight", torch.ones(3, 16)), r"has shape \(3, 16\)"),
    (put("base_model.model.model.embed_tokens.weight", torch.ones(V + 1, 16)), "has shape"),
    (lambda given: given.clear(), "missing|no low-rank"),
]


@pytest.mark.parametrize(("change", "message"), BAD_TENSORS)
def test_tensors_that_cannot_be_used(change: Callable[[dict[str, Any]], None], message: str, folder: Path) -> None:
    rewrite(folder, change, "adapter_model.safetensors")
    model = tiny()
    with pytest.raises(ModelError, match=message) as caught:
        load_adapter(folder, model)
    assert str(folder) in caught.value.where
    assert adapter_names(model) == []


def test_nothing_is_loaded_from_a_damaged_folder(folder: Path, tmp_path: Path) -> None:
    model = tiny()
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    for content, message in ((bytes(flipped), "SHA-256"), (whole[:-9], "its manifest says")):
        weights.write_bytes(content)
        with pytest.raises(ModelError, match=message):
            load_adapter(folder, model)
    manifest = json.loads((folder / "hanmo.json").read_text())
    (folder / "hanmo.json").unlink()
    for content, message in ((whole[:-9], "header describes"), (b"\x80\x04pickle..", "header"), (b"", "at least 8")):
        weights.write_bytes(content)
        with pytest.raises(ModelError, match=message):
            load_adapter(folder, model)
    weights.write_bytes(whole)
    for entry in (3, {}, {**manifest["adapter"], "parts": {"x": [1]}}, {**manifest["adapter"], "config": {"rank": 0}}):
        (folder / "hanmo.json").write_text(json.dumps({**manifest, "adapter": entry}))
        with pytest.raises(ModelError, match="manifest of the adapter is damaged"):
            load_adapter(folder, model)
    (folder / "hanmo.json").unlink()
    (folder / "adapter_config.json").write_text('{"r": 8,\n oops')
    with pytest.raises(ModelError, match="not valid JSON"):
        load_adapter(folder, model)
    weights.rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match="Python pickle"):
        load_adapter(folder, model)
    (folder / "adapter_model.bin").unlink()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="what kind of adapter"):
        load_adapter(folder, model)
    with pytest.raises(ModelError, match="does not exist"):
        load_adapter(tmp_path / "nowhere", model)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="whole model"):
        load_adapter(tmp_path, model)
    assert adapter_names(model) == []


def test_parts_in_the_manifest_that_the_tensors_do_not_have(tmp_path: Path) -> None:
    model = ours_of(theirs_of("gpt2"), tmp_path / "base")
    add_adapter(model, "a", PARTLY)
    save_adapter(tmp_path / "a", model, "a")
    manifest = json.loads((tmp_path / "a" / "hanmo.json").read_text())
    parts = manifest["adapter"]["parts"]
    assert parts["transformer.h.0.attn.c_attn"] == {
        "model.layers.0.self_attn.q_proj": [0, 3, 5.0],
        "model.layers.0.self_attn.v_proj": [3, 6, 5.0],
    }
    parts["transformer.h.0.attn.c_attn"]["model.layers.0.self_attn.v_proj"] = [3, 7, 5.0]
    (tmp_path / "a" / "hanmo.json").write_text(json.dumps(manifest))
    with pytest.raises(ModelError, match="manifest of the adapter is damaged"):
        load_adapter(tmp_path / "a", ours_of_folder(tmp_path / "base"))


def test_what_a_file_cannot_express(tmp_path: Path) -> None:
    model = ours_of(theirs_of("gpt2"), tmp_path / "base")
    add_adapter(model, "a", LoraConfig(2, targets=("mlp",), modules_to_save=("layers.0.self_attn.q_proj",)))
    with pytest.raises(ModelError, match="stored together with"):
        save_adapter(tmp_path / "a", model, "a")
    add_adapter(model, "b", LoraConfig(2, targets=("mlp",)))
    with torch.no_grad():
        next(iter(adapter_parameters(model, "b").values())).fill_(float("nan"))
    with pytest.raises(ModelError, match="NaN"):
        save_adapter(tmp_path / "a", model, "b")
    assert not (tmp_path / "a").exists()


def test_a_tied_embedding_with_two_values_is_refused(tmp_path: Path) -> None:
    model = tiny(tied=True)
    add_adapter(model, "a", LoraConfig(2, modules_to_save=("embed_tokens",)))
    save_adapter(tmp_path / "a", model, "a")
    name = "base_model.model.lm_head.weight"
    rewrite(tmp_path / "a", lambda given: given.update({name: given[name] + 1}), "adapter_model.safetensors")
    with pytest.raises(ModelError, match="different values"):
        load_adapter(tmp_path / "a", tiny(tied=True))
    rewrite(tmp_path / "a", lambda given: given.pop(name), "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"missing.*lm_head"):
        load_adapter(tmp_path / "a", tiny(tied=True))


def test_a_bias_of_the_output_is_not_exchanged(tmp_path: Path) -> None:
    model = ours_of(theirs_of("bert"), tmp_path / "base")
    add_adapter(model, "a", LoraConfig(2, modules_to_save=("embed_tokens",)))
    save_adapter(tmp_path / "a", model, "a")
    name = "base_model.model.cls.predictions.decoder.bias"
    rewrite(tmp_path / "a", lambda given: given.update({name: given[name] + 1}), "adapter_model.safetensors")
    with pytest.raises(ModelError, match="its own bias of the output"):
        load_adapter(tmp_path / "a", ours_of_folder(tmp_path / "base"))


def test_a_head_of_its_own_is_no_part_of_the_base(tmp_path: Path) -> None:
    """A classifier's head is drawn anew in every run; the adapter brings the one it was trained with."""
    config = tiny().config
    config = with_head(config, default_head(config, "sequence-classification", ("好", "坏", "中")))
    first, second = Transformer(config).eval(), Transformer(config).eval()
    second.load_state_dict(first.state_dict())
    randomize(second, 8, lambda name: name.startswith("head."))
    add_adapter(first, "a", LoraConfig(2, modules_to_save=("head",)))
    stir(first, "a")
    save_adapter(tmp_path / "a", first, "a")
    load_adapter(tmp_path / "a", second)
    assert torch.equal(our_scores(first), our_scores(second))


# What is trained -----------------------------------------------------------------------------------------------------

UNTIED = (
    ({"last_layers": 0}, {"lm_head."}),
    ({"last_layers": 1}, {"lm_head.", "model.norm.", "model.layers.1."}),
    ({"last_layers": 1, "head": False}, {"model.norm.", "model.layers.1."}),
    ({}, {"lm_head.", "model.norm.", "model.layers."}),
    ({"embeddings": True}, {""}),
    ({"last_layers": 0, "head": False, "embeddings": True}, {"model.embed_tokens."}),
)


@pytest.mark.parametrize(("choice", "starts"), UNTIED)
def test_train_only(choice: dict[str, Any], starts: set[str]) -> None:
    model = tiny()
    model.requires_grad_(False)
    count = train_only(model, **choice)
    expected = {name for name, _ in model.named_parameters() if name.startswith(tuple(starts))}
    assert trainable_parameters(model).keys() == expected
    assert count == sum(parameter.numel() for parameter in trainable_parameters(model).values()) > 0


def test_train_only_a_head_and_an_encoder_beside_a_decoder(tmp_path: Path) -> None:
    model = ours_of(theirs_of("bert-classifier"), tmp_path / "bert")
    train_only(model, last_layers=0)
    assert {name.split(".")[0] for name in trainable_parameters(model)} == {"head"}
    model = ours_of(theirs_of("t5"), tmp_path / "t5")
    train_only(model)
    assert any(name.startswith("encoder.layers.0.") for name in trainable_parameters(model))
    train_only(model, last_layers=1)
    assert all(name.startswith(("model.layers.1.", "model.norm.")) for name in trainable_parameters(model))


def test_train_only_refuses() -> None:
    for layers in (3, -1, 1.0):
        with pytest.raises(UsageError, match="the network has 2"):
            train_only(tiny(), last_layers=layers)  # type: ignore[arg-type]
    model = tiny(tied=True)
    with pytest.raises(UsageError, match=r"nothing would be trained[\s\S]*no weights of its own"):
        train_only(model, last_layers=0)
    assert trainable_parameters(model)
    add_adapter(model, "a", LoraConfig(2))
    with pytest.raises(UsageError, match="frozen or adapted"):
        train_only(model, last_layers=1)


def test_the_fingerprint_sees_values_and_names_but_no_adapters() -> None:
    model = tiny()
    first = weights_fingerprint(model)
    assert len(first) == 64
    add_adapter(model, "a", LoraConfig(2, modules_to_save=("embed_tokens",)))
    stir(model, "a")
    assert weights_fingerprint(model) == first
    remove_adapter(model, "a")
    assert weights_fingerprint(model) == first
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] += 1e-4  # type: ignore[union-attr,index,operator]
    assert weights_fingerprint(model) != first
    assert weights_fingerprint(model, without=["model.layers"]) == weights_fingerprint(tiny(), without=["model.layers"])
    half = tiny().bfloat16()
    assert weights_fingerprint(half) == weights_fingerprint(tiny().bfloat16().float())
