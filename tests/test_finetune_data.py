"""``hanmo finetune`` on data as people have them: other columns, languages and encodings, too long, too few, wrong."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hanmo
from hanmo.cli.contexts import shared_row
from hanmo.cli.main import main
from hanmo.data.tasks.types import Tagged
from hanmo.evaluation.task_baselines import Score, tag_measures, verdict
from hanmo.training.packing import pack

from .finetune_cases import CHATS, LABELLED, PREFERENCES, SIMILAR, TAGGED, WORDS, failed, finetune, lines, make_bases

STEPS = ["--max-steps", "2", "--no-baseline"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return make_bases(tmp_path_factory.mktemp("bases"))


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a run that ends well says on standard error."""
    capsys.readouterr()
    code = main(["finetune", *arguments])
    err = capsys.readouterr().err
    assert code == 0, err
    return err


# What the readers' settings do ----------------------------------------------------------------------------------------


def test_kinds_of_spans_are_renamed(bases: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = lines(tmp_path / "data.jsonl", TAGGED)
    common = [data, "--task", "tagging", "--base", bases["encoder"], *STEPS, "--relabel"]
    done = finetune(capsys, *common, "PER=PERSON", "--relabel", "LOC=O", "--out", str(tmp_path / "run"))
    config = json.loads((Path(done["model"]) / "config.json").read_text(encoding="utf-8"))
    assert set(config["id2label"].values()) == {"O", "B-PERSON"} and "f1" in done["measures"]
    code, message = failed(capsys, *common, "ORG=O", "--out", str(tmp_path / "other"))
    assert code == 3 and "'ORG', which is to be renamed, does not occur" in message and "known: LOC, PER" in message


def test_bad_records_stop_the_work_or_are_counted(
    bases: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Path(lines(tmp_path / "data.jsonl", LABELLED * 2))
    data.write_text(data.read_text(encoding="utf-8") + '\n{"text": 5, "label": null}\n', encoding="utf-8")
    common = [str(data), "--task", "classification", "--base", bases["encoder"], *STEPS]
    code, message = failed(capsys, *common, "--out", str(tmp_path / "run"))
    assert code == 3 and "data.jsonl:49" in message and "--skip-bad" in message
    assert "1 bad records" in told(capsys, *common, "--skip-bad", "--out", str(tmp_path / "run"))


def test_names_texts_and_labels_in_chinese(
    bases: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HANMO_LANG", "zh")
    rows = [
        f"{word}的电影{number}\t{label}" for number in range(12) for word, label in (("很好", "褒"), ("糟糕", "贬"))
    ]
    data = tmp_path / "影评.tsv.gz"
    data.write_bytes(gzip.compress(("评论\t情感\n" + "\n".join(rows)).encode("gb18030")))
    common = [str(data), "--task", "classification", "--base", bases["encoder"], "--max-steps", "2"]
    common += ["--fields", "text=评论", "--fields", "label=情感", "--encoding", "gb18030"]
    out = tmp_path / "运行"
    err = told(capsys, *common, "--out", str(out))
    assert "2 种标签：褒 12, 贬 12" in err and "线性分类器" in err and "训练 22，验证 2" in err.replace(", ", "，")
    (answer,) = hanmo.load(out).classify(["很好的电影3"])
    assert set(answer) == {"褒", "贬"}
    code, message = failed(capsys, *common, "--fields", "label=情绪", "--out", str(out), "--overwrite")
    assert code == 3 and "情绪" in message and "情感" in message


def test_several_labels_in_a_cell(bases: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.tsv"
    rows = [f"{word} {n}\t{label}" for n in range(10) for word, label in (("good", "a,b"), ("bad", "b"), ("so", "c"))]
    data.write_text("text\tlabel\n" + "\n".join(rows), encoding="utf-8")
    common = [str(data), "--task", "classification", "--base", bases["encoder"], "--max-steps", "2"]
    common += ["--label-separator", ",", "--out", str(tmp_path / "run")]
    done = finetune(capsys, *common, "--multi-label")
    config = json.loads((Path(done["model"]) / "config.json").read_text(encoding="utf-8"))
    assert set(config["id2label"].values()) == {"a", "b", "c"}
    assert [set(score["measures"]) for score in done["baselines"]] == [{"accuracy", "micro_f1"}] * 2
    code, message = failed(capsys, *common)
    assert code == 2 and "--label-separator belongs to --multi-label" in message


def test_similar_texts_by_their_score(
    bases: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [{**record, "score": number % 5} for number, record in enumerate(SIMILAR)]
    data = lines(tmp_path / "data.jsonl", records)
    common = [data, "--task", "embeddings", "--base", bases["encoder"], *STEPS, "--out", str(tmp_path / "run")]
    code, message = failed(capsys, *common)
    assert code == 3 and "--min-score" in message
    assert "18 records with a score below 3 are left out" in told(
        capsys, *common, "--min-score", "3", "--validation", data
    )
    code, message = failed(capsys, *common, "--overwrite", "--min-score", "5")
    assert code == 3 and "the highest is 4" in message


# Plain texts and preferences ------------------------------------------------------------------------------------------


def texts(folder: Path) -> str:
    folder.mkdir()
    for number in range(12):
        story = [f"{WORDS[number % 4]} {number} {line} {WORDS[line % 7]}.\n" for line in range(60)]
        (folder / f"故事{number}.txt").write_text("".join(story), encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize("extra", [[], ["--lora", "--rank", "2"], ["--last-layers", "1"]], ids=["all", "lora", "last"])
def test_pretraining_goes_on_with_plain_texts(
    extra: list[str], bases: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [texts(tmp_path / "文本"), "--task", "text", "--base", bases["decoder"], "--learning-rate", "0.01", *extra]
    common += ["--context", "32", "--batch-size", "4", "--checkpoint-every", "4"]
    done = finetune(capsys, *common, "--max-steps", "8", "--out", str(tmp_path / "run"))
    (before,) = done["baselines"]
    assert done["validation_loss"] < before["measures"]["loss"]
    assert hanmo.load(tmp_path / "run").generate("good", max_new_tokens=4)
    again = finetune(capsys, *common, "--max-steps", "8", "--out", str(tmp_path / "run"), "--resume")
    assert again["validation_loss"] == done["validation_loss"] and again["baselines"] == done["baselines"]
    (tmp_path / "文本/故事1.txt").write_text("another text", encoding="utf-8")
    code, message = failed(capsys, *common, "--max-steps", "8", "--out", str(tmp_path / "run"), "--resume")
    assert code == 4 and "begun with other texts" in message


def test_a_text_in_rows_shows_where_it_ends(
    bases: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = texts(tmp_path / "texts")
    err = told(capsys, folder, "--task", "text", "--base", bases["decoder"], *STEPS, "--out", str(tmp_path / "run"))
    assert "tokens are learned" in err and "context = 128" in err and "sees no more at once" in err
    code, message = failed(capsys, folder, "--task", "text", "--base", bases["encoder"], "--out", str(tmp_path / "x"))
    assert code == 4 and "needs a decoder" in message
    code, message = failed(capsys, folder, "--task", "text", "--base", bases["decoder"], "--truncate")
    assert code == 2 and "--truncate means nothing for --task text" in message


def test_simpo_needs_no_reference(bases: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = lines(tmp_path / "data.jsonl", PREFERENCES)
    common = [data, "--task", "preferences", "--base", bases["decoder"], *STEPS]
    finetune(capsys, *common, "--preference-loss", "simpo", "--out", str(tmp_path / "simpo"))
    assert not list((tmp_path / "simpo").glob("reference-*"))
    finetune(capsys, *common, "--out", str(tmp_path / "dpo"))
    assert len(list((tmp_path / "dpo").glob("reference-*"))) == 2


# How long rows are ----------------------------------------------------------------------------------------------------


def context_of(run: Path) -> tuple[int, str]:
    record = json.loads((run / "settings.json").read_text(encoding="utf-8"))
    return record["settings"]["context"], record["computed"]["context"]


def test_rows_are_as_long_as_the_data_need(
    bases: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--task", "classification", "--base", bases["decoder"], *STEPS]
    out = tmp_path / "run"
    told(capsys, lines(tmp_path / "short.jsonl", LABELLED), *common, "--out", str(out))
    assert context_of(out)[0] == 64  # and not the 128 that the network sees
    long = [*LABELLED * 5, {"text": "good film " * 100, "label": "good"}]
    data = lines(tmp_path / "long.jsonl", long)
    held = ["--validation", lines(tmp_path / "valid.jsonl", LABELLED[:4])]
    err = told(capsys, data, *held, *common, "--truncate", "--overwrite", "--out", str(out))
    assert context_of(out)[0] == 64 and "99 % of the records" in context_of(out)[1]
    assert "1 records are longer than the context" in err


def test_conversations_share_rows_with_little_waste(
    bases: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lengths = np.random.default_rng(1).integers(55, 90, 300).tolist()
    row = shared_row(lengths, 128, 4096)
    assert 128 < row < 512 and pack(lengths, row).waste <= 0.02 < pack(lengths, 128).waste
    assert shared_row([100] * 9, 128, 128) == 128  # the network sees no more
    data = lines(tmp_path / "data.jsonl", CHATS)
    err = told(capsys, data, "--base", bases["decoder"], *STEPS, "--out", str(tmp_path / "run"))
    assert "packing: 11 examples" in err and "the longest record has" in context_of(tmp_path / "run")[1]


# What cannot be learned from ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "name", "content", "message"),
    [
        ("classification", "空.csv", "", "the file is empty"),
        ("classification", "one.jsonl", [{"text": f"good {n}", "label": "good"} for n in range(9)], "needs two labels"),
        ("classification", "chats.jsonl", CHATS, "nothing that is called like text, label"),
        ("instructions", "labels.jsonl", LABELLED, "--fields"),
        ("preferences", "chats.jsonl", CHATS, "chosen"),
        ("tagging", "labels.jsonl", LABELLED, '"tags"'),
        ("question-answering", "labels.jsonl", LABELLED, "question"),
        ("embeddings", "chats.jsonl", CHATS, "anchor"),
        ("classification", "one.jsonl", LABELLED[:1], "--validation"),
        ("classification", "missing.csv", None, "there is no"),
    ],
)
def test_data_that_cannot_be_used_are_named(
    task: str,
    name: str,
    content: Any,
    message: str,
    bases: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / name
    if isinstance(content, str):
        path.write_text(content, encoding="utf-8")
    elif content is not None:
        lines(path, content)
    base = bases["decoder" if task in ("instructions", "preferences") else "encoder"]
    code, err = failed(capsys, str(path), "--task", task, "--base", base, "--out", str(tmp_path / "run"))
    assert code == 3 and message in err and name in err, err
    assert "Traceback" not in err and not (tmp_path / "run/model").exists()


def test_fewer_records_than_a_batch_are_one_batch(
    bases: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = lines(tmp_path / "data.jsonl", LABELLED[:6])
    common = [data, "--task", "classification", "--base", bases["encoder"], "--batch-size", "64", *STEPS]
    done = finetune(capsys, *common, "--validation", data, "--out", str(tmp_path / "run"))
    assert done["steps"] == 2 and done["measures"]["loss"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--relabel", "LOC", "--task", "tagging"], "expected OLD=NEW"),
        (["--relabel", "A=B"], "--relabel means nothing for --task instructions"),
        (["--min-score", "0.5"], "--min-score means nothing for --task instructions"),
        (["--split", "tail"], "--split means nothing for --task instructions"),
        (["--validation-share", "0"], "leaves nothing to validate on"),
        (["--validation-share", "0.2", "--validation", "x"], "two answers to one question"),
        (["--encoding", "utf-9"], "unknown encoding 'utf-9'"),
    ],
)
def test_settings_that_cannot_work(
    arguments: list[str], message: str, bases: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = lines(tmp_path / "data.jsonl", CHATS)
    code, err = failed(capsys, data, "--base", bases["decoder"], *arguments, "--out", str(tmp_path / "run"))
    assert code == 2 and message in err


def test_what_is_to_beat_is_measured_on_the_same_records(
    bases: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = lines(tmp_path / "data.jsonl", TAGGED)
    common = [data, "--task", "tagging", "--base", bases["encoder"], "--max-steps", "1", "--validation", data]
    done = finetune(capsys, *common, "--out", str(tmp_path / "run"))
    word, field = done["baselines"]  # both can learn these sentences by heart
    assert word["measures"] == field["measures"] == {"accuracy": 1.0, "f1": 1.0}
    code = main(["finetune", *common, "--out", str(tmp_path / "run"), "--overwrite"])
    assert code == 0 and "is as good or better (its f1: 1.0000)" in capsys.readouterr().out


def test_spans_are_scored_whole() -> None:
    records = [Tagged(("a", "b", "c"), ("B-X", "I-X", "O")), Tagged(("d",), ("B-Y",))]
    half = tag_measures([["B-X", "O", "O"], ["B-Y"]], records)  # one of two spans found, one found that is none
    assert half == {"accuracy": 0.75, "f1": 0.5}
    assert "f1" not in tag_measures([["NOUN"]], [Tagged(("a",), ("NOUN",))])
    both = [Score("x", {"loss": 2.0}), Score("y", {"loss": 1.0})]
    assert verdict(both, {"loss": 0.9}, of_base=True) == "" and "1.0000" in verdict(both, {"loss": 1.1}, of_base=True)
