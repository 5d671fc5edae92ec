"""Encoders in the native engine: what `torch` and `transformers` compute, and the same bits in any company."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from torch import Tensor

import hanmo
from hanmo import catalog
from hanmo.errors import ModelError, UsageError
from hanmo.inference.encoder import TextEncoder
from hanmo.inference.native import encoder as native_encoder
from hanmo.inference.native import library
from hanmo.inference.native.decoder import Weights
from hanmo.inference.native.encoder import PRECISIONS, NativeEncoder, reason_against_encoder
from hanmo.inference.native.quantize import quantize_int8, quantize_int8_wide
from hanmo.models.heads import HeadConfig
from hanmo.models.recurrent import RecurrentConfig, RecurrentEncoder
from hanmo.models.transformer import Transformer, TransformerConfig
from hanmo.text.tokenizer import Tokenizer
from hanmo.text.wrapping import Wrapped

from .native_cases import shaken

pytestmark = pytest.mark.skipif(library.load()[0] is None, reason=f"no native engine: {library.load()[1]}")

BASE: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 48,
    "num_layers": 3,
    "num_heads": 6,
    "num_kv_heads": 6,
    "head_dim": 8,
    "intermediate_size": 84,
    "max_position_embeddings": 300,
    "causal": False,
    "lm": False,
}
BERT: dict[str, Any] = {
    **{"norm": "layer", "norm_bias": True, "norm_placement": "post", "final_norm": False, "embedding_norm": True},
    **{"positions": "learned", "gated": False, "activation": "gelu", "token_types": 2},
    **{"attention_bias": True, "output_bias": True, "mlp_bias": True},
}
MODERN: dict[str, Any] = {
    **{"norm": "layer", "embedding_norm": True, "first_norm": False, "activation": "gelu"},
    **{"sliding_window": 21, "sliding_layers": (False, True, True), "rope_theta": 160_000.0, "rope_local_theta": 1e4},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "bert": BERT,
    "minilm": {**BERT, "hidden_size": 96, "num_heads": 3, "num_kv_heads": 3, "head_dim": 32, "intermediate_size": 384},
    "roberta": {**BERT, "position_offset": 2, "token_types": 1},
    "distilbert": {**BERT, "token_types": 0, "num_heads": 2, "num_kv_heads": 2, "head_dim": 24},
    "modernbert": MODERN,
    "one window": {**MODERN, "sliding_window": 70, "sliding_layers": None, "num_heads": 2, "num_kv_heads": 1,
                   "head_dim": 80},
    "llama that reads": {"qk_norm": True, "num_kv_heads": 2, "attention_bias": True, "output_bias": True},
    "odd sizes": {**BERT, "hidden_size": 33, "num_heads": 26, "num_kv_heads": 13, "head_dim": 4,
                  "activation": "gelu_tanh", "embedding_scale": 2.0},
    "heads of 20": {**BERT, "num_heads": 5, "num_kv_heads": 5, "head_dim": 20, "hidden_size": 100,
                    "activation": "relu"},
    "partly rotated": {"rotary_dim": 4, "num_heads": 2, "num_kv_heads": 1, "head_dim": 18, "activation": "gelu",
                       "rope_scaling": {"rope_type": "linear", "factor": 2.0}, "attention_scale": 0.3},
}  # fmt: skip
ERRORS = {"fp32": 3e-6, "fp16": 4e-3, "int8": 0.12}  # of the largest state, with the same weights
LENGTHS = (7, 1, 300, 33, 48, 49, 2, 130, 17, 96, 1, 64)
TEXTS = [
    torch.randint(0, 101, (length,), generator=torch.Generator().manual_seed(number)).tolist()
    for number, length in enumerate(LENGTHS)
]


def encoder(layout: str) -> Transformer:
    """A random network of a layout."""
    return shaken(Transformer(TransformerConfig(**{**BASE, **LAYOUTS[layout]})))


def native(model: Transformer, precision: str = "fp32", *, threads: int = 2) -> NativeEncoder:
    """The same network in the native engine."""
    return NativeEncoder(model.config, Weights.of_state(model.state_dict()), precision, threads)


def types_of(model: Transformer, texts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Segments: as those of pairs, where the network knows any."""
    second = model.config.token_types > 1
    return [[int(second and place > len(text) // 3) for place in range(len(text))] for text in texts]


def rounded(model: Transformer, precision: str) -> Transformer:
    """The network with the weights that the engine has: what differs then is its arithmetic."""
    state = {}
    for name, weight in model.state_dict().items():
        if precision != "int8" or not name.endswith(("proj.weight", "embed_tokens.weight")):
            state[name] = weight
        else:
            quantize = quantize_int8 if name == "model.embed_tokens.weight" else quantize_int8_wide
            state[name] = quantize(weight).dequantize()
    copy = Transformer(model.config).eval()
    copy.load_state_dict(state)
    return copy


@torch.inference_mode()
def of_torch(model: Transformer, texts: Sequence[Sequence[int]]) -> list[Tensor]:
    """States of each text by itself."""
    types = types_of(model, texts) if model.config.token_types else [None] * len(texts)
    return [
        model.hidden(torch.tensor([text]), types_BT=None if kinds is None else torch.tensor([kinds]))[0]
        for text, kinds in zip(texts, types, strict=True)
    ]


def of_native(model: Transformer, engine: NativeEncoder, texts: Sequence[Sequence[int]]) -> list[Tensor]:
    """States of each text, computed together."""
    states_MD = engine.hidden(texts, types_of(model, texts))
    return list(states_MD.split([len(text) for text in texts]))


@pytest.mark.parametrize(("layout", "precision"), itertools.product(LAYOUTS, ERRORS))
def test_states_are_those_of_the_network(layout: str, precision: str) -> None:
    model = encoder(layout)
    assert reason_against_encoder(model.config) is None
    expected = of_torch(rounded(model, precision), TEXTS)
    for got, wanted in zip(of_native(model, native(model, precision), TEXTS), expected, strict=True):
        assert (got - wanted).abs().max() <= ERRORS[precision] * wanted.abs().max()


@pytest.mark.parametrize(("layout", "precision"), itertools.product(LAYOUTS, ERRORS))
def test_bits_do_not_depend_on_company_order_or_threads(
    layout: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = encoder(layout)
    engine = native(model, precision)
    together = of_native(model, engine, TEXTS)
    for other in (engine, native(model, precision, threads=1), native(model, precision, threads=3)):
        for text, wanted in zip(TEXTS, together, strict=True):  # alone: the threads share a text
            assert torch.equal(of_native(model, other, [text])[0], wanted)
        for got, wanted in zip(of_native(model, other, TEXTS[::-1]), together[::-1], strict=True):
            assert torch.equal(got, wanted)
        for number, got in enumerate(of_native(model, other, [TEXTS[3], TEXTS[2]] * 20)):  # many jobs
            assert torch.equal(got, together[3 - number % 2])
    monkeypatch.setattr(native_encoder, "CALL_TOKENS", 100)
    for got, wanted in zip(of_native(model, engine, TEXTS), together, strict=True):
        assert torch.equal(got, wanted)


def test_impossible_texts_are_refused_and_do_no_harm() -> None:
    model = encoder("bert")
    engine = native(model)
    expected = engine.hidden(TEXTS)
    for texts, types, message in (
        ([[101]], None, "outside the vocabulary"),
        ([[1], [-1]], None, "outside the vocabulary"),
        ([[2**31]], None, "32 bits"),
        ([[1], [1, -(2**40)]], None, "32 bits"),
        ([[1] * 301], None, "outside the context"),
        ([[1] * 9000], None, "outside the context"),
        ([[]], None, "no tokens"),
        ([[1, 2], [], [3]], None, "no tokens"),
        ([[1, 2]], [[0, 2]], "segment"),
        ([[1, 2]], [[0, -1]], "segment"),
        ([[1, 2]], [[0, 2**33]], "32 bits"),
        ([[1, 2]], [[0]], "differ in length"),
        ([[1, 2]], [], "differ in length"),
    ):
        with pytest.raises(ModelError, match=message):
            engine.hidden(texts, types)
    assert torch.equal(engine.hidden(TEXTS), expected)
    assert engine.hidden([]).shape == (0, 48)
    no_segments = native(encoder("distilbert"))
    assert no_segments.hidden([[1, 2]], [[0, 0]]).isfinite().all()
    with pytest.raises(ModelError, match="segment"):
        no_segments.hidden([[1, 2]], [[0, 1]])
    engine.close()
    with pytest.raises(ModelError):
        engine.hidden([[1]])


def test_missing_misshapen_and_damaged_weights_are_refused() -> None:
    model = encoder("bert")
    state = dict(model.state_dict())
    up, types = "model.layers.1.mlp.up_proj.weight", "model.embed_types.weight"
    for name, value, message in (
        (up, state[up][:, :-1], "size"),
        (types, state[types][:, :-1], "size|segment"),
        ("model.embed_positions.weight", state["model.embed_positions.weight"][:-1], "size"),
        (types, state[types] * float("nan"), "not a number"),
        (up, state[up] * float("inf"), "not a number"),
    ):
        with pytest.raises(ModelError, match=message):
            NativeEncoder(model.config, Weights.of_state({**state, name: value}))
    without = {name: value for name, value in state.items() if name != "model.embed_positions.weight"}
    with pytest.raises(ModelError, match="missing"):
        NativeEncoder(model.config, Weights.of_state(without)).hidden([[1]])


def test_sums_that_overflow_spoil_only_their_own_text() -> None:
    model = encoder("bert")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["model.embed_tokens.weight"][100] = 3e38  # its norm divides by infinity
    for precision in ("fp32", "int8"):
        if precision == "int8":
            state["model.embed_tokens.weight"][100] = 6e4 * 127
            state["model.embed_norm.weight"] = state["model.embed_norm.weight"] * 1e34
        engine = NativeEncoder(model.config, Weights.of_state(state), precision, 2)
        tame = [[1, 2, 3] * 20] * 3
        wanted = engine.hidden(tame[:1])
        got = engine.hidden([*tame, [100] * 60, *tame]).split(60)
        for states_TD in (*got[:3], *got[4:]):
            assert torch.equal(states_TD.nan_to_num(7), wanted.nan_to_num(7))


# Real shapes ---------------------------------------------------------------------------------------------------------

WORDS = [*"床前明月光，疑是地上霜。", "the", "bright", "moon", "shines", "before", "my", "bed", "##s", "."]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SENTENCES = [
    "床前明月光，疑是地上霜。",
    "",
    "The bright moon shines before my beds.",
    "moon",
    "明月 moon " * 200,
    "霜",
    "my moon，地上霜 " * 12,
]
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "MiniLM": ("Bert", {"hidden_size": 384, "num_hidden_layers": 2, "num_attention_heads": 12,
                        "intermediate_size": 1536}),
    "BERT, heads of 64": ("Bert", {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
                                   "intermediate_size": 300, "hidden_act": "gelu_new"}),
    "RoBERTa, heads of 20": ("Roberta", {"hidden_size": 100, "num_hidden_layers": 2, "num_attention_heads": 5,
                                         "intermediate_size": 90, "pad_token_id": 0, "type_vocab_size": 1}),
    "XLM-R, heads of 24": ("XLMRoberta", {"hidden_size": 72, "num_hidden_layers": 2, "num_attention_heads": 3,
                                          "intermediate_size": 144, "pad_token_id": 1, "type_vocab_size": 1}),
    "DistilBERT, heads of 80": ("DistilBert", {"dim": 160, "n_layers": 2, "n_heads": 2, "hidden_dim": 200}),
    "ModernBERT": ("ModernBert", {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2,
                                  "intermediate_size": 100, "local_attention": 16, "pad_token_id": 0,
                                  "bos_token_id": None, "eos_token_id": None, "cls_token_id": 2, "sep_token_id": 3}),
}  # fmt: skip
CONTEXT = 200


def word_tokenizer() -> tokenizers.Tokenizer:
    """A word-piece tokenizer for Chinese and English."""
    vocabulary = {word: id for id, word in enumerate([*SPECIAL, *dict.fromkeys(WORDS)])}
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return made


def make(shape: str, task: str, folder: Path, **options: Any) -> Any:
    """A random network of `transformers`, saved with a tokenizer."""
    name, sizes = SHAPES[shape]
    rows = CONTEXT + (sizes["pad_token_id"] + 1 if "oberta" in name.lower() else 0)
    made = word_tokenizer()
    config = getattr(transformers, f"{name}Config")(
        vocab_size=made.get_vocab_size(), max_position_embeddings=rows, **sizes, **options
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}{task}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.copy_(torch.randn_like(parameter) * parameter.size(1) ** -0.5)
    model.save_pretrained(folder)
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), SPECIAL, strict=True))
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **names).save_pretrained(folder)
    return model


def inputs_of(model: Any, *texts: str) -> dict[str, Tensor]:
    """What `transformers` gets for a text or a pair."""
    made = word_tokenizer()
    made.enable_truncation(CONTEXT)
    found = made.encode(*texts)
    given = {"input_ids": torch.tensor([found.ids])}
    if getattr(model.config, "type_vocab_size", 0) > 1:
        given["token_type_ids"] = torch.tensor([found.type_ids])
    return given


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_states_and_vectors_are_those_of_transformers(shape: str, tmp_path: Path) -> None:
    model = make(shape, "Model", tmp_path)
    expected = [model(**inputs_of(model, text)).last_hidden_state[0] for text in SENTENCES]
    loaded = hanmo.load(tmp_path, device="cpu", engine="native")
    assert loaded.describe().startswith("native") and "fp32" in loaded.describe()
    rows = [Wrapped(inputs_of(model, text)["input_ids"][0].tolist(), [], (1,)) for text in SENTENCES]
    found = loaded.reader.run(rows, lambda states_MD, lengths_B, _: states_MD.split(lengths_B.tolist()))
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=2e-5)
    vectors = loaded.embed(SENTENCES)
    assert loaded.truncated == 1
    means = torch.stack([torch.nn.functional.normalize(wanted.mean(0), dim=0) for wanted in expected])
    np.testing.assert_allclose(vectors, means.numpy(), atol=3e-6)
    for precision, mean, worst in (("fp16", 0.99999, 0.9999), ("int8", 0.999, 0.995)):
        rough = hanmo.load(tmp_path, device="cpu", precision=precision)
        assert precision in rough.describe()
        cosines = (rough.embed(SENTENCES) * vectors).sum(1)
        assert cosines.mean() >= mean and cosines.min() >= worst
        assert not np.array_equal(rough.embed(SENTENCES), vectors)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_said_of_a_text_is_the_same_bits_in_any_batch(precision: str, tmp_path: Path) -> None:
    make("RoBERTa, heads of 20", "ForSequenceClassification", tmp_path, id2label={0: "否", 1: "yes", 2: "maybe"})
    loaded = hanmo.load(tmp_path, device="cpu", precision=precision)
    for call in (loaded.embed, loaded.predict_proba):
        together = call(SENTENCES * 3)
        for number, text in enumerate(SENTENCES):
            assert np.array_equal(call(text)[0], together[number])
        assert np.array_equal(call(SENTENCES[::-1])[::-1], together[: len(SENTENCES)])
        assert np.array_equal(call(SENTENCES, batch_size=1), together[: len(SENTENCES)])


@torch.no_grad()
def test_heads_read_native_states(tmp_path: Path) -> None:
    labels = {0: "否", 1: "yes", 2: "maybe"}
    model = make("MiniLM", "ForSequenceClassification", tmp_path / "classes", id2label=labels)
    pairs = [("床前明月光", "the bright moon"), ("", "moon"), ("moon " * 300, "霜")]
    for precision, tolerance in (("fp32", 1e-5), ("int8", 0.03)):
        loaded = hanmo.load(tmp_path / "classes", device="cpu", engine="native", precision=precision)
        for texts in (SENTENCES, pairs):
            parts = [(text,) if isinstance(text, str) else text for text in texts]
            expected = [model(**inputs_of(model, *part)).logits.softmax(-1)[0].numpy() for part in parts]
            np.testing.assert_allclose(loaded.predict_proba(texts), expected, atol=tolerance)
    model = make("BERT, heads of 64", "ForTokenClassification", tmp_path / "words", id2label=labels)
    loaded = hanmo.load(tmp_path / "words", device="cpu", engine="native")
    words = [*"床前明月光", "moon", "bright"]
    logits_TL = model(**inputs_of(model, " ".join(words))).logits[0, 1:-1]
    assert loaded.tag(words) == list(zip(words, [labels[best] for best in logits_TL.argmax(-1).tolist()], strict=True))
    found = [list(row.values()) for _, row in loaded.tag_probabilities(words)]
    np.testing.assert_allclose(found, logits_TL.softmax(-1).numpy(), atol=1e-5)
    model = make("XLM-R, heads of 24", "ForMaskedLM", tmp_path / "masked")
    loaded = hanmo.load(tmp_path / "masked", device="cpu", engine="native")
    ids = loaded.tokenizer.encode("the bright moon")
    expected = []
    for place, id in enumerate(ids, start=1):
        row = torch.tensor([[2, *ids, 3]])
        row[0, place] = 4
        expected.append(float(model(input_ids=row).logits[0, place].log_softmax(-1)[id]))
    np.testing.assert_allclose(loaded.pseudo_logprobs("the bright moon"), expected, atol=1e-4)
    assert sorted(loaded.fill("the [MASK] moon", n=50)[0], key=lambda one: -one.probability)[0].probability > 0


def test_the_weights_are_held_once(tmp_path: Path) -> None:
    make("MiniLM", "ForSequenceClassification", tmp_path, id2label={0: "a", 1: "b"})
    loaded = hanmo.load(tmp_path, device="cpu", engine="native")
    loaded.embed("moon")
    kept = {name for name, weight in loaded.model.named_parameters() if not weight.is_meta}
    assert kept and all(name.startswith("head.") for name in kept)
    whole = sum(weight.numel() * 4 for name, weight in loaded.model.named_parameters() if name not in kept)
    assert loaded.reader.encoder.weight_bytes == pytest.approx(whole, rel=0.01)
    assert loaded.device.type == "cpu"


# What the engine does not compute ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"positions": "relative"}, "its positions are relative"),
        ({"causal": True}, "not an encoder"),
        ({"norm": "rms+1", "norm_placement": "sandwich"}, "norms"),
        ({"attention_softcap": 30.0}, "capped"),
        ({"activation": "tanh"}, "its activation is tanh"),
    ],
)
def test_other_networks_are_computed_by_torch_which_says_so(changes: dict[str, Any], reason: str) -> None:
    config = TransformerConfig(**{**BASE, "head": HeadConfig("sequence-classification", ("a", "b")), **changes})
    assert reason in str(reason_against_encoder(config))
    made, model = Tokenizer.from_json(word_tokenizer().to_str()), shaken(Transformer(config))
    automatic = TextEncoder(model, made, engine="auto")
    assert automatic.describe() == "torch on cpu"
    assert automatic.embed(SENTENCES).shape == (len(SENTENCES), 48)
    for options in ({"engine": "native"}, {"engine": "auto", "precision": "int8"}):
        with pytest.raises(UsageError, match=reason):
            TextEncoder(model, made, **options)


def test_a_recurrent_network_refuses_what_it_cannot_have() -> None:
    made = Tokenizer.from_json(word_tokenizer().to_str())
    config = RecurrentConfig("lstm", made.vocab_size, 16, 16, 1, tie_embeddings=False, bidirectional=True)
    network = RecurrentEncoder(config, HeadConfig())
    assert TextEncoder(network, made, engine="auto").describe() == "torch on cpu"
    with pytest.raises(UsageError, match="it is a recurrent network"):
        TextEncoder(network, made, engine="native")


def test_options_that_are_none_are_refused(tmp_path: Path) -> None:
    make("MiniLM", "Model", tmp_path)
    for options, message in (
        ({"precision": "int4"}, "no precision 'int4'"),
        ({"precision": "int9"}, "int9"),
        ({"engine": "naive"}, "naive"),
        ({"engine": "torch", "precision": "int8"}, "--precision int8 needs the native engine"),
        ({"kv_cache": "int8"}, "--kv-cache int8 is for decoders"),
    ):
        with pytest.raises(UsageError, match=message):
            hanmo.load(tmp_path, device="cpu", **options)
    assert hanmo.load(tmp_path, device="cpu", engine="torch").describe() == "torch on cpu"


# Processes and threads -----------------------------------------------------------------------------------------------


def in_a_process(program: str, **environment: str) -> list[str]:
    """The words that a program prints in a process of its own; it must end by itself."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([".", *sys.path]), **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_without_the_engine_torch_computes_the_same(tmp_path: Path) -> None:
    make("RoBERTa, heads of 20", "Model", tmp_path / "model")
    loaded = hanmo.load(tmp_path / "model", device="cpu")
    program = f"""
        import numpy as np, hanmo, hanmo.errors
        from tests.test_native_encoder import SENTENCES
        folder = {str(tmp_path)!r}
        loaded = hanmo.load(folder + "/model", device="cpu")
        np.save(folder + "/vectors.npy", loaded.embed(SENTENCES))
        print(loaded.describe().replace(" ", "-"))
        for options in ({{"engine": "native"}}, {{"precision": "int8"}}):
            try:
                hanmo.load(folder + "/model", device="cpu", **options)
            except hanmo.errors.UsageError:
                print("refused")
    """
    assert in_a_process(program, HANMO_NATIVE="0") == ["torch-on-cpu", "refused", "refused"]
    np.testing.assert_allclose(loaded.embed(SENTENCES), np.load(tmp_path / "vectors.npy"), atol=3e-6)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_process_computes_with_what_its_parent_made(tmp_path: Path) -> None:
    """Both with an encoder of the parent's and with one that it loads, while another thread of the parent computes."""
    make("MiniLM", "Model", tmp_path)
    program = f"""
        import os, signal, threading, hanmo, numpy
        from tests.test_native_encoder import SENTENCES
        loaded, texts = hanmo.load({str(tmp_path)!r}, device="cpu"), SENTENCES * 4
        expected = loaded.embed(texts)
        done = threading.Event()
        busy = threading.Thread(target=lambda: [loaded.embed(texts) for _ in iter(done.is_set, True)], daemon=True)
        busy.start()
        for _ in range(3):
            child = os.fork()
            if not child:
                signal.alarm(60)
                own = hanmo.load({str(tmp_path)!r}, device="cpu")
                same = [numpy.array_equal(one.embed(texts), expected) for one in (loaded, own)]
                os._exit(0 if all(same) else 1)
            assert os.waitpid(child, 0)[1] == 0
        done.set()
        busy.join()
        print("alive", numpy.array_equal(loaded.embed(texts), expected))
    """
    assert in_a_process(program, HANMO_THREADS="2", OMP_NUM_THREADS="2") == ["alive", "True"]


def test_threads_may_embed_at_the_same_time(tmp_path: Path) -> None:
    """The first to come prepares the weights; the others wait for it."""
    make("MiniLM", "Model", tmp_path)
    loaded = hanmo.load(tmp_path, device="cpu", engine="native")
    found: dict[int, Any] = {}

    def work(number: int) -> None:
        found[number] = [loaded.embed(SENTENCES[number:]) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    expected = loaded.embed(SENTENCES)
    assert sorted(found) == [0, 1, 2, 3]
    for number, results in found.items():
        assert all(np.array_equal(result, expected[number:]) for result in results)


# The real thing ------------------------------------------------------------------------------------------------------


def test_minilm_in_8_bits_is_close(shared_data: Path) -> None:
    """all-MiniLM-L6-v2, where it is on this machine: in the catalog's cache or where HANMO_MINILM says."""
    named = os.environ.get("HANMO_MINILM")
    folder = Path(named) if named else catalog.cache_folder("all-minilm-l6-v2")
    if not (folder / "model.safetensors").is_file():
        pytest.skip("all-minilm-l6-v2 is not on this machine")
    texts = []
    for language in ("en", "zh"):
        lines = (shared_data / "ud-pud" / f"{language}_pud-ud-test.conllu").read_text("utf-8").splitlines()
        texts += [line[9:] for line in lines if line.startswith("# text = ")][:60]
    exact = hanmo.load(folder, device="cpu", engine="native")
    reference = hanmo.load(folder, device="cpu", engine="torch")
    vectors = exact.embed(texts)
    np.testing.assert_allclose(vectors, reference.embed(texts), atol=2e-6)
    cosines = (hanmo.load(folder, device="cpu", precision="int8").embed(texts) * vectors).sum(1)
    assert cosines.mean() >= 0.995
    assert cosines.min() >= 0.98
