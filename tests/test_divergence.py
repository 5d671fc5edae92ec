"""The divergence of two models' predictions, against the formulas written out."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hanmo.cli.main import main
from hanmo.errors import UsageError
from hanmo.evaluation import divergence as module
from hanmo.evaluation.divergence import divergence
from hanmo.inference.language_model import LanguageModel
from hanmo.inference.native import library
from hanmo.models.checkpoints.save import save_folder
from hanmo.text.training import train_bpe

from .native_cases import decoder

V = 13


class Table:
    """Scores that depend on the position in the window and the token."""

    def __init__(self, seed: int) -> None:
        self.scores = 2 * torch.randn(40, V, generator=torch.Generator().manual_seed(seed))

    def logits(self, ids: list[int]) -> Tensor:
        return self.scores[: len(ids)] + torch.tensor(ids).unsqueeze(1) * 0.1


def test_statistics_are_those_of_the_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS", 3)
    ids = torch.randint(0, V, (99,), generator=torch.Generator().manual_seed(2)).tolist()
    found = divergence(Table(0), Table(1), ids, window=9)
    kl, same, rights, losses = [], [], [], []
    for start in range(0, 99, 9):
        part = ids[start : start + 9]
        p, q = (np.asarray(table.logits(part).double().softmax(1)) for table in (Table(0), Table(1)))
        for place in range(8):
            kl.append(sum(a * math.log(a / b) for a, b in zip(p[place], q[place], strict=True)))
            same.append(p[place].argmax() == q[place].argmax())
            right = part[place + 1]
            rights.append(p[place][right] - q[place][right])
            losses.append((-math.log(p[place][right]), -math.log(q[place][right])))
    reference, model = np.exp(np.mean(losses, axis=0))
    assert (found.tokens, found.windows) == (88, 11)
    expected = [np.mean(kl), np.median(kl), np.quantile(kl, 0.99), max(kl), np.mean(same)]
    expected += [math.sqrt(np.mean(np.square(rights))), model, reference, model / reference]
    values = [found.kl, found.kl_median, found.kl_99, found.kl_most, found.same_top, found.probability_rms]
    assert [*values, found.perplexity, found.reference_perplexity, found.ratio] == pytest.approx(expected)
    assert found.kl_interval is not None and found.kl_interval[0] < found.kl < found.kl_interval[1]
    assert found.ratio_interval is not None and found.ratio_interval[0] < found.ratio < found.ratio_interval[1]


def test_equal_models_do_not_diverge() -> None:
    found = divergence(Table(0), Table(0), [1, 2, 3, 4] * 3, window=4)
    assert (found.kl, found.same_top, found.probability_rms, found.ratio) == (0, 1, 0, 1)
    assert found.kl_interval is None, "three windows say nothing of their spread"
    json.dumps(found.as_dict())
    assert "12" not in found.describe().splitlines()[0]


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(UsageError, match="less than a window"):
        divergence(Table(0), Table(1), [1, 2, 3], window=4)
    other = Table(1)
    other.scores = other.scores[:, :7]
    with pytest.raises(UsageError, match="13 and 7 tokens"):
        divergence(Table(0), other, [1] * 8, window=4)


@pytest.mark.skipif(library.load()[0] is None, reason=f"no native engine: {library.load()[1]}")
def test_a_quantised_model_against_its_original(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [f"春眠不觉晓，处处闻啼鸟。The quick brown fox number {number}.\n" for number in range(90)]
    (tmp_path / "texts").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "texts" / f"{number}.txt").write_text(text * 3, encoding="utf-8")
    tokenizer = train_bpe(texts, 300)
    model = decoder("llama", vocab_size=tokenizer.vocab_size)
    save_folder(tmp_path / "model", model, tokenizer, provenance={})
    ids = tokenizer.encode(texts[0])[:30]
    with torch.inference_mode():
        torch.testing.assert_close(
            LanguageModel(model, tokenizer).logits(ids), model(torch.tensor([ids]))[0], atol=1e-5, rtol=1e-4
        )
    arguments = ["evaluate", str(tmp_path / "model"), str(tmp_path / "texts"), "--out", str(tmp_path / "data")]
    arguments += ["--test-share", "0.3", "--against", str(tmp_path / "model"), "--json"]
    assert main(arguments) == 0
    same = json.loads(capsys.readouterr().out)["divergence"]
    assert abs(same["kl"]) < 1e-9 and same["same_top"] == 1 and same["tokens"] > 500
    for engine in ("torch", "native"):
        assert main([*arguments, "--engine", engine]) == 0
        assert json.loads(capsys.readouterr().out)["divergence"]["kl"] < 1e-8
    assert main([*arguments, "--precision", "int8"]) == 0
    assert 1e-9 < json.loads(capsys.readouterr().out)["divergence"]["kl"] < 0.05
