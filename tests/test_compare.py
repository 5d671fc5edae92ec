"""hanmo evaluate --task, hanmo TASK and hanmo compare; and how a comparison chooses."""

from __future__ import annotations

import json
import multiprocessing
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hanmo.cli.main import main
from hanmo.data.tasks.types import Labelled
from hanmo.errors import UsageError
from hanmo.evaluation.choice import Limit, as_row, broken, choose, pareto, parse_limits
from hanmo.evaluation.compare_report import comparison_page, render_comparison
from hanmo.evaluation.scoring import score
from hanmo.evaluation.trials import Candidate, Parts, Trial, run_trial
from hanmo.models.linear import LinearClassifier
from hanmo.tasks.base import System
from hanmo.tasks.classification import Classification, Verdict

TASK = Classification()
TRUTH = ["a", "b"] * 100
RECORDS = [Labelled(f"text {number}", (label,)) for number, label in enumerate(TRUTH)]
WORDS = {"good": ["great", "lovely", "nice", "superb"], "bad": ["awful", "dull", "poor", "sad"]}


class Fixed(System[Labelled, Verdict]):
    def __init__(self, errors: float, seed: int) -> None:
        self.name = f"{errors:g}"
        wrong = np.random.default_rng(seed).permutation(len(TRUTH)) < errors * len(TRUTH)
        self.verdicts = [Verdict((t if not w else "ab".replace(t, ""),)) for t, w in zip(TRUTH, wrong, strict=True)]

    def answer(self, records: Any) -> list[Verdict]:
        return self.verdicts[: len(records)]


def trial(name: str, errors: float, latency: float, memory: float, seed: int = 0, **others: Any) -> Trial:
    made = Trial(name, "classical", score=score(TASK, Fixed(errors, seed), RECORDS), **others)
    made.latencies, made.peak_memory, made.throughput = [latency] * 5, int(memory), 1 / latency
    return made


def test_limits_are_read_with_their_units() -> None:
    limits = parse_limits("latency<20ms, p99<=1s，memory<500MB;size<1GiB, train<2min, energy<1Wh, quality>90%")
    assert [limit.bound for limit in limits] == [0.02, 1.0, 5e8, 2**30, 120.0, 3600.0, 0.9]
    assert [limit.above for limit in limits] == [False] * 6 + [True]
    for text in ("latency=3", "speed<3", "memory<3ms", "latency<3MB", "quality>", "cost<3J"):
        with pytest.raises(UsageError):
            parse_limits(text)


def test_the_cheapest_of_those_that_are_not_worse_is_recommended() -> None:
    good, same = trial("large", 0.05, 0.5, 9e8), trial("small", 0.06, 0.001, 1e8, seed=1)
    bad, failed = trial("tiny", 0.4, 0.0001, 5e7), Trial("broken", problem="it failed")
    trials, metric = [good, same, bad, failed], TASK.metric(RECORDS)
    choice = choose(trials, metric, [])
    assert choice.recommended is same and choice.best is good
    assert "no significant difference" in choice.reason and "large" in choice.reason
    only = choose(trials, metric, parse_limits("latency>0.1"))
    assert only.recommended is good and "the best within the limits" in only.reason
    none = choose(trials, metric, parse_limits("quality>0.999, latency<1ms"))
    assert none.recommended is None and "quality>0.999" in none.reason
    assert choose([failed], metric, []).recommended is None
    assert pareto(trials, lower=False) == [True, True, True, False]
    assert pareto([good, trial("worse", 0.2, 0.6, 9e8)], lower=False) == [True, False]
    assert broken(good, parse_limits("memory<500MB"))[0].text == "memory<500MB"
    assert Limit("train", False, 1.0, "train<1").kept(None) and not Limit("latency", False, 1.0, "l").kept(None)
    rows = [as_row(each, True, []) for each in trials]
    assert json.loads(json.dumps(rows))[0]["latency"] == 0.5 and rows[3]["problem"] == "it failed"
    for text in (
        render_comparison(trials, [True, True, True, False], choice, [], "accuracy", 200),
        comparison_page("x <script>", trials, [True, True, True, False], choice, [], "accuracy", 200),
    ):
        assert "large" in text and "it failed" in text and "<script>" not in text


def kill_children() -> None:
    while not (children := multiprocessing.active_children()):
        time.sleep(0.01)
    for child in children:
        child.kill()


def test_a_candidate_that_takes_too_long_or_dies_takes_nobody_with_it() -> None:
    parts, candidate = Parts(RECORDS, [], RECORDS), Candidate("baseline", "x", 1)
    late = run_trial(candidate, "classification", parts, 0.01)
    assert late.score is None and ("not ready" in late.problem or "未完成" in late.problem)
    assert not multiprocessing.active_children()
    thread = threading.Thread(target=kill_children)
    thread.start()
    died = run_trial(candidate, "classification", parts, 60)
    thread.join()
    assert died.score is None and ("killed" in died.problem or "终止" in died.problem)


def sentences(count: int, seed: int) -> list[Labelled]:
    generator = np.random.default_rng(seed)
    out = []
    for number in range(count):
        label = "good" if generator.random() < 0.6 else "bad"
        words = generator.choice(WORDS[label], 2)
        out.append(Labelled(f"film {number} was {words[0]} and {words[1]}", (label,), file="f", line=number + 1))
    return out


def test_a_trial_measures_what_serving_takes() -> None:
    parts = Parts(sentences(120, 0), sentences(30, 1), sentences(50, 2))
    result = run_trial(Candidate("baseline", "linear", 1), "classification", parts, 120)
    assert result.problem == "" and result.score is not None and result.score.main.value > 0.9
    assert result.train_seconds and len(result.latencies) == 30 and result.size and result.size > 1000
    assert result.peak_memory and result.peak_memory > 1e7 and result.joules and result.energy_source
    missing = run_trial(Candidate("model", "no-such-model"), "classification", parts, 60)
    assert missing.score is None and "no-such-model" in missing.problem


def test_few_records_are_cross_validated() -> None:
    """Each record is answered by what has not seen it; what is served has seen all."""
    rare = [Labelled(f"word{number}", (str(number % 2),), file="f", line=number + 1) for number in range(40)]
    parts = Parts(rare, [], rare, folds=5)
    result = run_trial(Candidate("candidate", "bayes", 0), "classification", parts, 120)
    assert result.score is not None and result.score.main.value < 0.8  # a text of its own teaches nothing of the others
    assert result.score.without_leaks is None and "folds:5" in result.score.signature
    assert result.train_seconds and result.size and result.throughput > 0
    seen = run_trial(Candidate("candidate", "bayes", 0), "classification", Parts(rare, [], rare), 120)
    assert seen.score is not None and seen.score.main.value > 0.9  # as this data would score without folds


def test_networks_are_taught_without_each_fold(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from hanmo.cli import compare

    taught: list[tuple[set[str], float]] = []

    def fine_tune(*given: Any) -> Path:
        taught.append(({record.text for record in given[3].train}, given[4]))
        return tmp_path / str(len(taught))

    monkeypatch.setattr(compare, "fine_tune", fine_tune)
    candidate, settings = Candidate("finetune", "tiny"), compare.CompareSettings(data=["x"])
    parts = Parts(RECORDS, [], RECORDS, folds=5)
    models = compare.fine_tune_folds(candidate, settings, TASK, parts, 60.0, 100.0, tmp_path)
    texts = {record.text for record in RECORDS}
    assert len(set(models)) == 5 and {budget for _, budget in taught} == {10.0}
    left_out = [texts - seen for seen, _ in taught]
    assert set.union(*left_out) == texts and sum(map(len, left_out)) == len(texts)
    assert compare.fine_tune_folds(candidate, settings, TASK, Parts(RECORDS, [], RECORDS), 60.0, 100.0, tmp_path) == ()


# The verbs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def films(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, count, seed in (("films.csv", 200, 0), ("more.csv", 80, 1)):
        lines = ["review,verdict", *(f'"{r.text},\nindeed",{r.labels[0]}' for r in sentences(count, seed))]
        Path(name).write_bytes(("\ufeff" + "\r\n".join(lines) + "\r\n").encode())
    data = sentences(200, 0)
    LinearClassifier(C=1.0).fit([r.text for r in data], [r.labels[0] for r in data]).save(tmp_path / "model")
    return tmp_path


def test_evaluate_a_task(films: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["evaluate", "--task", "sentiment", "--data", "more.csv", "--fields", "text=review"]
    common += ["--fields", "label=verdict"]
    assert main([*common, "--train", "films.csv", "--model", "model", "--json", "--answers", "answers.json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["n"] == 80 and [row["kind"] for row in data["scores"]] == ["baseline", "classical", "classical"]
    assert data["scores"][2]["measures"]["accuracy"]["value"] > 0.9 and len(data["differences"]) == 2
    answers = json.loads((films / "answers.json").read_text())["answers"]
    assert len(answers) == 80 and answers[1]["where"] == "more.csv:4"
    assert main([*common, "--limit", "40"]) == 0  # baselines alone, each fold by what the others teach
    shown = capsys.readouterr()
    assert "folds:5" in shown.out and "n = 40" in shown.out
    assert main(["evaluate", "--task", "sentiment"]) == 2 and "--data" in capsys.readouterr().err
    assert main(["evaluate"]) == 2 and "MODEL is missing" in capsys.readouterr().err


def test_predict_texts_lines_and_columns(
    films: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["sentiment", "--model", "model", "a superb and lovely film"]) == 0
    assert capsys.readouterr().out.startswith("good 0.")
    monkeypatch.setattr("sys.stdin", __import__("io").StringIO("so dull\n\nso nice, 很好\n"))
    assert main(["classification", "--model", "model", "--json"]) == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert [answer["labels"] for answer in answers] == [["bad"], ["good"]]
    out = films / "out" / "answers.jsonl"
    command = ["predict", "--model", "model", "--file", "films.csv", "--text-field", "review", "--out", str(out)]
    assert main(command) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 200 and rows[1]["where"] == "films.csv:4" and "\n" in rows[0]["text"]
    Path("lines.txt").write_bytes("poor thing\r\n\r\nnice day\r\n".encode("utf-16"))
    assert main(["predict", "--model", "model", "--file", "lines.txt", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["answers"]) == 2
    assert main(["sentiment", "text"]) == 2 and "--model" in capsys.readouterr().err


def test_compare(films: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compare", "--task", "sentiment", "--data", "films.csv", "--test", "more.csv"]
    command += ["--fields", "text=review", "--fields"]
    command += ["label=verdict", "--budget", "90s", "--models", "model", "--limits", "latency<1s, memory<4GB", "--json"]
    assert main(command) == 0
    data = json.loads(capsys.readouterr().out)
    assert data == json.loads((films / "runs/compare-classification/compare.json").read_text())
    rows = {row["name"]: row for row in data["rows"]}
    assert data["recommended"] in rows and data["reason"] and len(rows) >= 4
    assert rows[data["recommended"]]["quality"] > 0.9 and data["records"]["test"] > 20
    assert any(row["pareto"] for row in data["rows"])
    page = (films / "runs/compare-classification/compare.html").read_text()
    assert "<svg" in page and data["reason"].split(" (")[0] in page


def test_estimator_is_one_of_scikit_learn() -> None:
    from sklearn.base import clone
    from sklearn.model_selection import cross_val_score

    from hanmo import TextClassifier

    data = sentences(150, 3)
    X, y = [r.text for r in data], [int(r.labels[0] == "good") for r in data]
    assert cross_val_score(clone(TextClassifier(C=1.0)), X, y, cv=3).mean() > 0.9
    fitted = TextClassifier(C=1.0, method="svm").fit(X, y)
    assert fitted.classes_.tolist() == [0, 1] and fitted.predict(["superb and nice"]).tolist() == [1]
    assert fitted.predict_proba(X[:4]).sum(1) == pytest.approx(np.ones(4))
    with pytest.raises(UsageError, match="labels"):
        TextClassifier().fit(X, y[:-1])
