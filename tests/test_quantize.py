"""Quantisation to 4 bits that is calibrated with text, against rounding each weight for itself."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import hanmo
from hanmo.cli.main import main
from hanmo.errors import DataError, ModelError
from hanmo.inference.language_model import LanguageModel
from hanmo.inference.native import calibration_text, library
from hanmo.inference.native.calibration import backward_pass, calibrate
from hanmo.inference.native.calibration_text import own_text, text_of_files
from hanmo.inference.native.layout import Quantized
from hanmo.inference.native.quantize import UNEVEN_RANGES, quantize_int4
from hanmo.inference.native.rounding import Rounded, damped, inverse_factor, round_to_int4
from hanmo.models.checkpoints.save import save_folder
from hanmo.models.transformer import Transformer
from hanmo.text.tokenizer import Tokenizer
from hanmo.text.training import train_bpe

from .native_cases import BASE, LAYOUTS, decoder

native = pytest.mark.skipif(library.load()[0] is None, reason=f"no native engine: {library.load()[1]}")
TEXTS = [f"春眠不觉晓，处处闻啼鸟。The quick brown fox number {number}.\n" for number in range(90)]


def correlated(K: int, seed: int = 0, tokens: int = 1000) -> Tensor:
    """Inputs ``[tokens, K]`` of a few directions and some noise, of very different sizes."""
    shape, generator = torch.Generator().manual_seed(9), torch.Generator().manual_seed(seed)
    few = torch.randn(tokens, 12, generator=generator) @ torch.randn(12, K, generator=shape)
    return (few + torch.randn(tokens, K, generator=generator)) * torch.rand(K, generator=shape).square()


def matrix(N: int, K: int) -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(3))


def loss(weights_NK: Tensor, rounded: Quantized, inputs_TK: Tensor) -> float:
    """The mean squared error of the outputs."""
    return float((inputs_TK @ (weights_NK - rounded.dequantize()).T).square().mean())


# Rounding -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("N", "K"), [(40, 128), (7, 70), (16, 20), (3, 33)])
def test_outputs_are_kept_better_than_by_the_nearest_weights(N: int, K: int) -> None:
    weights, inputs, others = matrix(N, K), correlated(K), correlated(K, seed=1)
    moments = inputs.T @ inputs
    rounded = round_to_int4(weights, moments)
    assert rounded.kind == "int4-minimum" and rounded.size == (N, K) and rounded.integers_NGI.max() <= 15
    plain, weighted = quantize_int4(weights), quantize_int4(weights, moments.diagonal() / len(inputs))
    assert loss(weights, rounded, inputs) < 0.6 * min(loss(weights, plain, inputs), loss(weights, weighted, inputs))
    assert loss(weights, rounded, others) < 0.8 * loss(weights, plain, others)
    assert torch.equal(rounded.dequantize(), round_to_int4(weights, moments).dequantize())


def test_every_step_lowers_the_objective() -> None:
    weights, inputs = matrix(24, 96), correlated(96)
    moments = damped(inputs.T @ inputs)
    rounded = Rounded(weights, moments)
    rounded.compensate(inverse_factor(moments))
    losses = []
    for _ in range(4):
        lost = rounded.lost()
        losses.append(float((lost * (moments @ lost)).sum()))
        rounded.sweep()
    assert losses[1] < 0.95 * losses[0] and losses == sorted(losses, reverse=True)
    again = rounded.quantized().dequantize()
    torch.testing.assert_close(weights - rounded.lost().T, again, rtol=0, atol=1e-6)


def test_the_factor_is_that_of_the_inverse() -> None:
    moments = damped(correlated(50).T @ correlated(50))
    upper = inverse_factor(moments)
    assert torch.equal(upper, upper.triu())
    torch.testing.assert_close(upper.T @ upper @ moments, torch.eye(50), atol=1e-3, rtol=0)


def test_inputs_that_never_occur() -> None:
    weights, inputs = matrix(9, 96), correlated(96)
    inputs[:, 5:40] = 0  # a whole group among them
    rounded = round_to_int4(weights, inputs.T @ inputs)
    assert loss(weights, rounded, inputs) < 0.6 * loss(weights, quantize_int4(weights), inputs)
    assert (weights - rounded.dequantize())[:, 5:40].abs().max() < 1, "they keep weights that are near"
    nothing = round_to_int4(weights, torch.zeros(96, 96))
    fitted = quantize_int4(weights, ranges=UNEVEN_RANGES)
    assert loss(weights, nothing, torch.eye(96)) <= loss(weights, fitted, torch.eye(96))


def test_moments_of_one_direction_and_equal_weights() -> None:
    """Singular moments, and groups without any range."""
    direction = torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
    for weights in (matrix(5, 64), torch.full((5, 64), 0.3), torch.zeros(5, 64)):
        rounded = round_to_int4(weights, 1e6 * direction.T @ direction)
        assert rounded.dequantize().isfinite().all() and loss(weights, rounded, direction) < 0.05
    assert torch.equal(rounded.dequantize(), torch.zeros(5, 64))
    indefinite = torch.eye(64)
    indefinite[0, 1] = indefinite[1, 0] = 1.5
    assert inverse_factor(indefinite).isfinite().all()


# Networks -------------------------------------------------------------------------------------------------------------


def structured(layout: str) -> tuple[Transformer, Tensor]:
    """A network whose predictions depend on the text, and text of it that repeats itself."""
    model = decoder(layout)
    generator = torch.Generator().manual_seed(5)
    return model, torch.randint(0, 24, (12, 64), generator=generator)


def with_matrices(model: Transformer, matrices: dict[str, Quantized]) -> Transformer:
    changed = copy.deepcopy(model)
    state = changed.state_dict()
    for name, value in matrices.items():
        assert state[name].shape == value.size
        state[name].copy_(value.dequantize())
    return changed


@torch.no_grad()
def kl(reference: Transformer, model: Transformer, ids: Tensor) -> float:
    p, q = (network(ids).double().log_softmax(-1) for network in (reference, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_predictions_are_kept_better_than_by_the_nearest_weights(layout: str) -> None:
    model, ids = structured(layout)
    matrices = calibrate(copy.deepcopy(model), ids[:8])
    names = {name for name, weight in model.named_parameters() if weight.dim() == 2 and ".layers." in name}
    assert set(matrices) == names and all(value.kind == "int4-minimum" for value in matrices.values())
    plain = {name: quantize_int4(model.state_dict()[name]) for name in names}
    ours, theirs = (kl(model, with_matrices(model, found), ids[8:]) for found in (matrices, plain))
    assert 0 < ours < 0.7 * theirs
    again = calibrate(copy.deepcopy(model), ids[:8])
    assert all(torch.equal(again[name].dequantize(), value.dequantize()) for name, value in matrices.items())


def test_weights_of_tokens_are_squared_gradients() -> None:
    """Of the loss by an output, against the same with a shift of that output as a parameter."""
    model, ids = structured("qwen2")
    trace = backward_pass(copy.deepcopy(model).requires_grad_(False), ids[:2], 7, lambda _: None)
    generator = torch.Generator().manual_seed(7)
    for row in range(2):
        drawn = torch.multinomial(model(ids[row : row + 1])[0].softmax(-1), 1, generator=generator)[:, 0]
        up = model.model.layers[1].mlp.up_proj
        shift = torch.zeros(1, 64, up.out_features, requires_grad=True)
        handle = up.register_forward_hook(lambda _, __, output, shift=shift: output + shift)
        torch.nn.functional.cross_entropy(model(ids[row : row + 1])[0], drawn, reduction="sum").backward()
        handle.remove()
        assert shift.grad is not None
        expected = shift.grad[0].square().sum(-1)
        torch.testing.assert_close(trace.weights[1]["mlp.up_proj"][row], expected, rtol=1e-3, atol=1e-7)


def test_a_network_that_overflows_is_refused() -> None:
    model, ids = structured("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(1e30)
        model.model.layers[1].mlp.gate_proj.weight.fill_(1e30)
    with pytest.raises(ModelError, match="NaN or infinite"):
        calibrate(model, ids)


# Text -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_bpe(TEXTS, 300)


@pytest.fixture(scope="module")
def folder(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("quantize")
    save_folder(path / "model", decoder("llama", vocab_size=tokenizer.vocab_size), tokenizer, provenance={})
    for number in range(2):
        (path / f"text{number}.txt").write_text("".join(TEXTS) * (number + 1), encoding="utf-8")
    return path


def test_windows_come_from_all_over_the_files(folder: Path, tokenizer: Tokenizer) -> None:
    model = LanguageModel(decoder("llama", vocab_size=tokenizer.vocab_size), tokenizer, prompt_prefix=[7, 8])
    found = text_of_files([folder / "text0.txt", folder / "text1.txt"], model)
    tokens, record = found.tokens_BT, found.record
    assert tokens.shape[1] == record["window"] == BASE["max_position_embeddings"]
    assert tokens.numel() == record["tokens"] and tokens[:, :2].tolist() == [[7, 8]] * len(tokens)
    assert [file["file"] for file in record["files"]] == ["text0.txt", "text1.txt"]
    assert all(len(file["sha256"]) == 64 for file in record["files"])
    first, last = (tokenizer.decode(tokens[row, 2:].tolist()) for row in (0, record["files"][0]["windows"] - 1))
    assert first[:150] == "".join(TEXTS)[:150] and last[5:45] in "".join(TEXTS)[-2500:]
    assert torch.equal(text_of_files([folder / "text0.txt"], model).tokens_BT[0], tokens[0])


def test_too_little_text(folder: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    model = LanguageModel(decoder("llama", vocab_size=tokenizer.vocab_size), tokenizer)
    short = folder / "short.txt"
    short.write_text(TEXTS[0], encoding="utf-8")
    with pytest.raises(DataError, match="fewer than 128 tokens"):
        text_of_files([short], model)
    short.write_text("".join(TEXTS[:30]), encoding="utf-8")
    text_of_files([short], model)
    assert "about 16,384 are better" in capsys.readouterr().err


def test_own_text_is_the_same_each_time(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration_text, "TOKENS", 256 + 128 * 21)
    model = LanguageModel(decoder("llama", vocab_size=tokenizer.vocab_size), tokenizer, prompt_prefix=[3])
    first = own_text(model).tokens_BT
    assert first.shape == (23, 128) and (first[:, 0] == 3).all()
    assert torch.equal(first, own_text(model).tokens_BT)
    assert not torch.equal(first[0], first[20]), "the same opening goes on differently"
    assert not torch.equal(first, own_text(model, seed=100).tokens_BT)


# The command ----------------------------------------------------------------------------------------------------------


@native
@pytest.mark.parametrize("given", ["own", "file", "none"])
def test_quantize_writes_a_folder_that_generates(
    folder: Path, tmp_path: Path, given: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration_text, "TOKENS", 1024)
    arguments = ["quantize", str(folder / "model"), str(tmp_path / "small"), "--precision", "int4", "--json"]
    options = {"own": [], "file": ["--calibration", str(folder / "text0.txt")], "none": ["--no-calibration"]}
    assert main([*arguments, *options[given]]) == 0
    printed = json.loads(capsys.readouterr().out)
    record = json.loads((tmp_path / "small" / "hanmo.json").read_text())["quantized"]
    if given == "none":
        assert printed["calibration"] is None and "calibration" not in record
    else:
        assert printed["calibration"] == record["calibration"] and record["calibration"]["tokens"] == 1024
        assert [file["file"] for file in record["calibration"]["files"]] == ["text0.txt"] * (given == "file")
        said = "1,024 tokens of text0.txt" if given == "file" else "1,024 tokens of its own"
        assert said in (tmp_path / "small" / "README.md").read_text(encoding="utf-8")
    assert printed["weights_by_kind"].keys() == {"int8", "int4-minimum"}
    model, original = hanmo.load(tmp_path / "small"), hanmo.load(folder / "model")
    assert len(model.generate("春眠", max_new_tokens=5)[0].ids) > 0
    ids = original.tokenizer.encode("".join(TEXTS))[:100]
    p, q = (network.logits(ids).double().log_softmax(-1) for network in (original, model))
    assert 0 < float((p.exp() * (p - q)).sum(-1).mean()) < 0.2


@pytest.mark.parametrize(
    ("options", "code", "expected"),
    [
        (["--calibration", "missing.txt", "--precision", "int4"], 3, "missing.txt"),
        (["--calibration", "bad.txt", "--precision", "int4"], 3, "bad.txt:2"),
        (["--calibration", "short.txt", "--precision", "int4"], 3, "fewer than"),
        (["--calibration", "short.txt"], 2, "--precision int4"),
        (["--calibration", "short.txt", "--no-calibration", "--precision", "int4"], 2, "exclude each other"),
    ],
)
def test_bad_calibration(
    folder: Path,
    tmp_path: Path,
    options: list[str],
    code: int,
    expected: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("short.txt").write_text("春眠\n")
    Path("bad.txt").write_bytes("春眠\n处处\ufffd闻啼鸟\n".encode().replace(b"\xef\xbf\xbd", b"\xff\xfe") * 2)
    assert main(["quantize", str(folder / "model"), "small", *options]) == code
    assert expected in capsys.readouterr().err
    assert not Path("small").exists()
