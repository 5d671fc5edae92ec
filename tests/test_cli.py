"""The command line as a user meets it: help, mistakes, JSON, exit codes, and the whole road on small texts."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import random
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hanmo.cli import docs
from hanmo.cli import main as cli
from hanmo.cli.main import VERBS, main
from hanmo.evaluation.intervals import MIN_UNITS

HEAVY = ("torch", "numpy", "tokenizers", "tiktoken", "transformers", "fastapi", "pyarrow", "opencc", "gguf", "jinja2")
HOSTILE = "<img src=x onerror=alert(1)> & "
ROOT = Path(__file__).resolve().parents[1]
TINY = ["--size", "nano", "--context", "64", "--vocab-size", "300", "--batch-size", "8"]


@dataclass
class Result:
    """What a command line did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which must be exactly one JSON document."""
        assert self.out.endswith("\n") and self.out.count("\n") == 1, self.out
        return json.loads(self.out)


def call(*arguments: str, language: str = "en") -> Result:
    """Run a command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HANMO_LANG", language)
        patch.setenv("HANMO_OFFLINE", "")  # so that --offline is forgotten afterwards
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.delenv("HANMO_QUIET", raising=False)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(list(arguments))
    return Result(code, out.getvalue(), err.getvalue())


def spawn(*arguments: str, language: str = "en", **variables: str) -> subprocess.CompletedProcess[bytes]:
    """Run a command line as a process of its own."""
    command = [sys.executable, "-m", "hanmo.cli.main", *arguments]
    return subprocess.run(
        command, capture_output=True, env={**os.environ, "HANMO_LANG": language, **variables}, check=False
    )


# Help ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_verb(arguments: list[str]) -> None:
    for language, word in (("en", "usage: hanmo VERB"), ("zh", "用法：hanmo 动词")):
        result = call(*arguments, language=language)
        assert result.code == 0 and result.err == ""
        assert word in result.out
        for verb in VERBS:
            assert re.search(rf"^  {verb} +\S", result.out, re.MULTILINE), verb


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_each_verb(verb: str) -> None:
    english, chinese = call(verb, "--help"), call(verb, "--help", language="zh")
    assert english.code == chinese.code == 0 and english.err == chinese.err == ""
    assert f"usage: hanmo {verb}" in english.out and f"用法：hanmo {verb}" in chinese.out
    assert not re.search("[\u4e00-\u9fff]", english.out.replace("/", "")), "English help without Chinese"
    assert re.search("[\u4e00-\u9fff]", chinese.out)
    for flag in ("--config", "--json", "--offline"):
        assert flag in english.out and flag in chinese.out


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys\nfrom hanmo.cli.main import VERBS, main\n"
        "codes = [main(['--help'])] + [main([verb, '--help']) for verb in VERBS]\n"
        f"print(codes, sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)\n"
    )
    for language in ("en", "zh"):
        environment = {**os.environ, "HANMO_LANG": language}
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True
        )
        assert done.stderr.strip() == f"{[0] * (len(VERBS) + 1)} []"


def test_help_is_fast() -> None:
    """Under 0.3 s of processor time, which a busy machine changes less than time on the clock."""
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert spawn("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.3, seconds


def test_version() -> None:
    from hanmo import __version__

    assert call("--version").out == f"hanmo {__version__}\n" == call("-V").out


@pytest.mark.parametrize(("language", "name"), docs.FILES.items())
def test_the_reference_is_up_to_date(language: str, name: str) -> None:
    written = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert written == docs.render_in(language), f"docs/{name} is out of date; regenerate it with:  {docs.COMMAND}"


# Mistakes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["biuld"], 2, "unknown verb 'biuld'\n  fix: did you mean 'build'?"),
        (["build", "--buget", "3min"], 2, "did you mean '--budget'?"),
        (["build", "--size", "huge"], 2, "--size cannot be 'huge'"),
        (["build", "--max-steps", "0"], 2, "--max-steps is 0, and must be 1 or more"),
        (["build", "--context", "4"], 2, "--context is 4, and must be 8 or more"),
        (["build", "--learning-rate", "0"], 2, "--learning-rate must be above 0"),
        (["build", "--budget", "soon"], 2, "'soon' is not a duration"),
        (["build", "--budget", "3min", "--max-steps", "5"], 2, "two answers to one question"),
        (["build", "--validation-share", "2"], 2, "a share lies between 0 and 1"),
        (["data", "--encoding", "utf-7up"], 2, "unknown encoding"),
        (["tokenizer", "--tokenizer", "char2"], 2, "a tokenizer to train is bpe or char"),
        (["pretrain", "--config", "no.yaml"], 2, "there is no such recipe"),
        (["evaluate"], 2, "MODEL is missing"),
        (["generate"], 2, "MODEL is missing"),
        (["doctor", "now"], 2, "unknown argument now"),
        (["data", "no-such-folder"], 3, "no-such-folder"),
        (["build", "no-such-folder"], 3, "no-such-folder"),
        (["generate", "no-such-model", "x"], 4, "there is no model 'no-such-model'"),
        (["chat", "no-such-model"], 4, "there is no model 'no-such-model'"),
        (["evaluate", "no-such-model"], 4, "there is no model 'no-such-model'"),
        (["data", "--out", "/proc/nowhere/data"], 5, "the folder cannot be made"),
        (["generate", "smollm2-135m-instruct", "x", "--offline"], 6, "the network is not to be used"),
    ],
)
def test_mistakes_have_a_message_and_an_exit_code(
    arguments: list[str], code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HANMO_HOME", str(tmp_path / "home"))
    if arguments[0] == "data" and "--out" in arguments:
        (tmp_path / "a.txt").write_text("words " * 1000)
        arguments = [*arguments, "a.txt"]
    result = call(*arguments)
    assert result.code == code, result.err
    assert message in result.err and result.err.startswith("error: ")
    assert "Traceback" not in result.err and result.out == ""

    told = call(*arguments, "--json")
    error = told.json["error"]
    assert told.code == code == error["exit_code"]
    assert set(error) == {"what", "where", "why", "fix", "exit_code"} and error["what"]

    chinese = call(*arguments, language="zh")
    assert chinese.code == code and chinese.err.startswith("错误: ")


def test_a_defect_shows_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    from hanmo.cli import doctor

    def broken() -> dict[str, Any]:
        raise ZeroDivisionError("oh no")

    monkeypatch.setattr(doctor, "examine", broken)
    result = call("doctor")
    assert result.code == 1 and result.out == ""
    assert "Traceback" in result.err and "ZeroDivisionError: oh no" in result.err and "please report it" in result.err
    told = call("doctor", "--json")
    assert told.code == 1 == told.json["error"]["exit_code"] and "oh no" in told.json["error"]["what"]


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (KeyboardInterrupt(), 130),
        (MemoryError(), 5),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9e15 bytes"), 5),
        (OSError(28, "No space left on device", "log.jsonl"), 5),
        (RuntimeError("something else"), 1),
    ],
)
def test_what_else_can_happen(raised: BaseException, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from hanmo.cli import doctor

    def fail() -> dict[str, Any]:
        raise raised

    monkeypatch.setattr(doctor, "examine", fail)
    result = call("doctor", "--json")
    assert result.code == code == result.json["error"]["exit_code"]
    assert ("Traceback" in result.err) == (code == 1)


def test_a_reader_that_goes_away_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "hanmo.cli.main", "--help"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, env=dict(os.environ), check=False)
    os.close(write)
    assert done.returncode == 0 and done.stderr == b""


def test_a_terminal_without_chinese_gets_question_marks_and_valid_json() -> None:
    done = spawn("--help", language="zh", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and b"?" in done.stdout and b"hanmo chat" in done.stdout
    done = spawn("data", "没有", "--json", PYTHONIOENCODING="ascii")
    assert done.returncode == 3 and "没有" in json.loads(done.stdout)["error"]["what"]


# Doctor --------------------------------------------------------------------------------------------------------------


def test_doctor_tells_what_is_here_and_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from hanmo.cli import doctor

    result = call("doctor", "--json")
    assert result.code == 0
    report = result.json
    assert report["python"].startswith("3.") and report["cores"] >= 1 and report["matrix_gflops"] > 0
    assert report["devices"][-1] == "cpu" and report["packages"]["torch"] and report["disk_free"] > 0

    real = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda name: None if name in ("pyarrow", "tiktoken") else real(name))
    for language in ("en", "zh"):
        text = call("doctor", language=language).out
        assert "pip install 'hanmo[parquet]'" in text and "missing: tiktoken" in text


# The whole road ------------------------------------------------------------------------------------------------------

WORDS = {
    "en": (
        ["river", "garden", "window", "teacher", "sailor", "winter", "letter", "market", "bridge", "lantern"],
        ["carries", "finds", "watches", "paints", "follows", "remembers"],
        "The {} {} a {} near the {}, number {}. ",
    ),
    "zh": (
        ["河流", "花园", "窗户", "老师", "水手", "冬天", "书信", "市场", "石桥", "灯笼"],
        ["带来", "找到", "看着", "画出", "跟随", "记得"],
        "{}{}{}，就在{}旁边，一共{}次。",
    ),
}


def make_texts(folder: Path, language: str) -> None:
    """About 200 KB of sentences in 120 files; each begins with what a browser must never run."""
    draw = random.Random(language)
    nouns, verbs, pattern = WORDS[language]
    folder.mkdir()
    for index in range(120):
        sentences = [
            pattern.format(*map(draw.choice, (nouns, verbs, nouns, nouns)), draw.randrange(1000)) for _ in range(30)
        ]
        (folder / f"{index:03}.txt").write_text(HOSTILE + "".join(sentences), encoding="utf-8")


@pytest.fixture(scope="session", params=["en", "zh"])
def road(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """One ``hanmo build`` for each language, shared by the tests below."""
    base = tmp_path_factory.mktemp(f"road-{request.param}")
    texts, run = base / "texts", base / "run"
    make_texts(texts, request.param)
    result = call("build", str(texts), "--max-steps", "20", *TINY, "--out", str(run), "--json", language=request.param)
    assert result.code == 0, result.err
    yield SimpleNamespace(language=request.param, base=base, texts=texts, run=run, result=result)


def test_build_tells_everything_in_one_document(road: SimpleNamespace) -> None:
    document = road.result.json
    assert document["run"] == str(road.run)
    assert document["training"]["steps"] == 20 and document["training"]["tokens"] == 20 * 8 * 64
    stored = json.loads((road.run / "evaluation.json").read_text(encoding="utf-8"))
    assert document["evaluation"] == stored
    uniform, ngram, model = stored["rows"]
    assert (uniform["name"], ngram["name"], model["name"]) == ("uniform", "5-gram Kneser-Ney", "run")
    assert uniform["perplexity"] == pytest.approx(300)
    for row in stored["rows"]:
        assert (row["bits_per_byte_interval"] is None) == (row["units"] < MIN_UNITS)  # too little text for an interval
        low, high = row["bits_per_byte_interval"] or (0, math.inf)
        assert low <= row["bits_per_byte"] <= high
    assert ngram["bits_per_byte"] < uniform["bits_per_byte"] > model["bits_per_byte"], (
        "twenty steps beat knowing nothing"
    )


def test_build_explains_itself_on_standard_error(road: SimpleNamespace) -> None:
    err = road.result.err
    computed, expected, bar = {
        "en": ("settings that were computed:", "expected, before the start:", "training: "),
        "zh": ("自动选择的设置：", "开始之前的估计：", "训练: "),
    }[road.language]
    assert err.index(computed) < err.index("learning_rate = ") < err.index(expected) < err.index(bar)
    record = json.loads((road.run / "settings.json").read_text(encoding="utf-8"))
    assert set(record["computed"]) == {"micro_batch", "learning_rate", "weight_decay"}
    assert all(record["computed"].values()) and record["settings"]["max_steps"] == 20
    log = [json.loads(line) for line in (road.run / "log.jsonl").read_text().splitlines()]
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert len(losses) == 20 and losses[-1] < losses[0]


def test_the_report_is_self_contained_and_safe(road: SimpleNamespace) -> None:
    page = (road.run / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?://|//\w+\.\w+/|@import|<script|<link|<iframe|url\(", page.split("</head>")[-1])
    assert "http" not in page and "<script" not in page and "<link" not in page
    assert "<img" not in page and "&lt;img src=x" in page, "texts of the user are shown, never run"
    assert "<svg" in page and "polyline" in page
    for part in ("uniform", "5-gram Kneser-Ney", "learning_rate", "bits per byte", "micro_batch"):
        assert part in page
    if road.language == "zh":
        assert "zh" in page and "参数量" in page


def test_the_model_is_the_same_in_transformers(road: SimpleNamespace) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import hanmo

    ours = hanmo.load(road.run, engine="torch")
    theirs = AutoModelForCausalLM.from_pretrained(road.run / "model", torch_dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(road.run / "model")
    text = (road.texts / "000.txt").read_text(encoding="utf-8")[:200]
    ids = ours.tokenizer.encode(text)[:64]
    assert tokenizer(text, add_special_tokens=False)["input_ids"][:64] == ids
    batch = torch.tensor([ids])
    with torch.no_grad():
        torch.testing.assert_close(ours.model(batch), theirs(batch).logits, rtol=1e-4, atol=1e-4)


def test_an_earlier_run_is_never_overwritten_by_accident(road: SimpleNamespace) -> None:
    before = (road.run / "model" / "hanmo.json").read_bytes()
    arguments = ["build", str(road.texts), "--max-steps", "20", *TINY, "--out", str(road.run)]
    result = call(*arguments)
    assert result.code == 2 and "--resume" in result.err and "--overwrite" in result.err
    assert "--overwrite" in call(*arguments, language="zh").err
    assert (road.run / "model" / "hanmo.json").read_bytes() == before


def test_overwriting_starts_anew_but_only_when_all_is_well(road: SimpleNamespace) -> None:
    run = road.base / "again"
    steps = ["--max-steps", "2", *TINY, "--out", str(run)]
    assert call("pretrain", str(road.texts), *steps).code == 0

    def contents() -> list[tuple[str, int]]:
        return sorted((str(path), path.stat().st_mtime_ns) for path in run.rglob("*") if path.is_file())

    before = contents()
    for mistake, code in ((["no-such-folder"], 3), ([str(road.texts), "--tokenizer", "cahr"], 2)):
        assert call("pretrain", *mistake, *steps, "--overwrite").code == code
        assert contents() == before, "a mistake costs nothing"
    assert call("pretrain", str(road.texts), *steps, "--overwrite").code == 0
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2], "the log of the earlier run is gone"


def test_resuming_again_and_again_keeps_what_was_computed(
    road: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hanmo.training import plan

    run = road.base / "resumed"
    arguments = ["pretrain", str(road.texts), "--max-steps", "2", "--context", "32", "--out", str(run)]
    trained = [call(*arguments, "--json").json]
    weights = (run / "model" / "model.safetensors").read_bytes()
    first = json.loads((run / "settings.json").read_text())
    assert "learning_rate" in first["computed"] and "size" in first["computed"]
    monkeypatch.setattr(
        plan, "learning_rate", lambda _: (0.5, "another machine")
    )  # another machine, or a newer version
    for _ in range(2):
        trained.append(call(*arguments, "--resume", "--json").json)
        again = json.loads((run / "settings.json").read_text())
        assert again["computed"] == first["computed"]
        assert again["settings"] == {**first["settings"], "resume": True, "json": True}
    assert [entry["steps"] for entry in trained] == [2, 2, 2]
    assert (run / "model" / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("name", ["model", "checkpoints"])
def test_a_folder_that_is_not_a_run_is_never_touched(road: SimpleNamespace, tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "precious.txt").write_text("precious")
    for extra in ([], ["--overwrite"], ["--resume"]):
        result = call("pretrain", str(road.texts), "--max-steps", "1", *TINY, "--out", str(tmp_path), *extra)
        assert result.code == 2 and "is not a run" in result.err
    assert [path.name for path in tmp_path.rglob("*")] == [name, "precious.txt"]


def test_generate(road: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = {"en": "The river", "zh": "河流"}[road.language]
    options = ["--max-new-tokens", "6", "--seed", "1"]
    several = call("generate", str(road.run), *options, prompt, "--n", "2", "--json").json["completions"]
    assert [entry["choice"] for entry in several] == [0, 1]
    assert all(1 <= len(entry["ids"]) <= 6 for entry in several)

    one = call("generate", str(road.run), prompt, *options, "--json").json["completions"][0]["text"]
    streamed = call("generate", str(road.run), *options, prompt)
    assert streamed == Result(0, f"{prompt}{one}\n", "")
    monkeypatch.setattr(sys, "stdin", io.StringIO(prompt + "\n"))
    assert call("generate", str(road.run), *options).out == streamed.out, "a pipe is a prompt"

    refused = call("generate", str(road.run), prompt, "--top-p", "7")
    assert refused.code == 2 and refused.out == "", "nothing is written before the settings are checked"


def test_chat_with_a_base_model_through_a_pipe(road: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("The river\n/reset\n\n/exit\nnever read\n"))
    result = call("chat", str(road.run), "--max-new-tokens", "4", "--seed", "1")
    assert result.code == 0 and result.out.strip() and "never" not in result.out
    monkeypatch.setattr(sys, "stdin", io.StringIO("The river\n"))
    turns = call("chat", str(road.run), "--max-new-tokens", "4", "--seed", "1", "--json").json["turns"]
    assert turns == [{"prompt": "The river", "answer": result.out.splitlines()[0]}]


def test_evaluate_again_gives_the_same_numbers(road: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(road.base)
    stored = json.loads((road.run / "evaluation.json").read_text(encoding="utf-8"))
    result = call("evaluate", str(road.run / "model"), "--json")
    assert [row["nats"] for row in result.json["rows"]] == pytest.approx([row["nats"] for row in stored["rows"]])
    assert result.json["signature"] == stored["signature"]
    table = call("evaluate", "run", str(road.texts), "--out", "other", "--part", "validation", language="zh")
    assert table.code == 0 and "比特/字节" in table.out and "split:validation" in table.out


def test_evaluating_a_model_without_texts_of_its_own(road: SimpleNamespace, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(road.run / "model", tmp_path / "alone")
    result = call("evaluate", str(tmp_path / "alone"))
    assert result.code == 2 and "give the texts to evaluate on" in result.err


def test_the_stages_one_by_one_from_a_recipe(road: SimpleNamespace) -> None:
    """data -> tokenizer -> pretrain from a recipe, each with one JSON document on standard output."""
    base = road.base
    prepared = call("data", str(road.texts), "--out", str(base / "data"), "--tokenizer", str(road.run), "--json").json
    assert prepared["report"]["documents"] == 120 and prepared["tokens"]["vocab_size"] == 300
    tokenizer = call(
        *("tokenizer", str(base / "data"), "--vocab-size", "280", "--out", str(base / "tok")),
        *("--reference", str(road.run), "--json"),
    ).json
    assert tokenizer["vocab_size"] == 280 and tokenizer["report"]["reference"] == "run"
    measured = {row["name"]: row for row in tokenizer["report"]["texts"]}[road.language]
    assert measured["characters_per_token"] > 0.5 and measured["reference_characters_per_token"] > 0.5

    recipe = base / "recipe.yaml"
    lines = [
        f"paths: [{json.dumps(str(base / 'data'))}]",
        f"tokenizer: {json.dumps(str(base / 'tok'))}",
        *("size: nano", "context: 32", "batch_size: 4", "max_steps: 9"),
    ]
    recipe.write_text("\n".join(lines), encoding="utf-8")
    flags = ["--max-steps", "2", "--out", str(base / "trained"), "--json"]
    trained = call("pretrain", "--config", str(recipe), *flags).json
    assert trained["steps"] == 2, "the flag wins over the recipe"
    settings = json.loads((base / "trained" / "settings.json").read_text())["settings"]
    assert settings["context"] == 32 and settings["size"] == "nano"

    recipe.write_text("max_step: 2\n")
    refused = call("pretrain", "--config", str(recipe))
    assert refused.code == 2 and f"{recipe}:1" in refused.err and "did you mean 'max_steps'?" in refused.err


def test_a_tokenizer_never_replaces_other_files(road: SimpleNamespace) -> None:
    for place in (road.texts, road.run):
        before = sorted(place.rglob("*"))
        result = call("tokenizer", str(road.texts), "--vocab-size", "300", "--out", str(place))
        assert result.code == 2 and "it would be lost" in result.err
        assert sorted(place.rglob("*")) == before


def test_a_tokenizer_that_does_not_exist(road: SimpleNamespace) -> None:
    result = call("pretrain", str(road.texts), "--tokenizer", "cahr", "--max-steps", "1", "--out", str(road.base / "x"))
    assert result.code == 2 and "did you mean 'char'?" in result.err


def test_too_little_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words " * 30)
    result = call("build", str(tmp_path / "a.txt"), "--out", str(tmp_path / "run"))
    assert result.code == 3 and "are needed" in result.err


def test_the_verbs_are_the_documented_ones() -> None:
    for verb in VERBS:
        module = cli.load_verb(verb)
        assert module.HELP and module.HELP_ZH and module.run.__doc__
        assert cli.settings_class(module).__doc__


def test_a_second_process_cannot_touch_a_run_that_is_being_written(tmp_path: Path) -> None:
    from hanmo.training.checkpoint import run_lock

    out = tmp_path / "run"
    (out / "checkpoints" / "step-00000001").mkdir(parents=True)
    for name in ("settings.json", "log.jsonl"):
        (out / name).write_text("{}\n")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    (tmp_path / "a.txt").write_text("words and more words, line after line\n" * 200)
    with run_lock(out):
        code = main(["pretrain", str(tmp_path / "a.txt"), "--out", str(out), "--max-steps", "3", "--overwrite"])
    assert code == 2
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"} == before
