"""Settings: one dataclass gives flags, recipe keys and help, and every mistake is told with its cure."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hanmo.cli.main import VERBS, load_verb, settings_class
from hanmo.errors import UsageError
from hanmo.settings import (
    UNITS,
    CommonSettings,
    Resolution,
    argument,
    option,
    parse,
    parse_duration,
)


@dataclass
class Demo(CommonSettings):
    """Count things."""

    model: str = argument("what to count with", zh="用什么数")
    paths: list[str] = argument("what to count", zh="数什么", many=True)
    max_steps: int | None = option(None, "at most so many", zh="上限")
    rate: float = option(0.5, "how fast: 100% is fast", zh="速度：100% 为快")
    size: str = option("nano", "how large", zh="大小", choices=("nano", "micro"))
    dedup: bool = option(True, "keep copies", zh="保留重复")
    skip_bad: bool = option(False, "skip what is bad", zh="跳过坏的")
    stop: list[str] = option([], "stop here", zh="停止", metavar="TEXT")
    weights: list[int] = option([1, 2], "weights", zh="权重")
    top_k: int = option(0, "zero is off", zh="0 为关闭", short="-k")


def read(*arguments: str) -> Demo:
    return parse(Demo, list(arguments), "hanmo demo", "Count things.")


def refusal(*arguments: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        read(*arguments)
    return caught.value


@pytest.fixture
def recipe(tmp_path: Path):  # type: ignore[no-untyped-def]
    """Write a recipe and return its path."""

    def write(text: str | bytes) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return str(path)

    return write


# The command line ----------------------------------------------------------------------------------------------------


def test_defaults() -> None:
    assert read("m") == Demo(model="m")
    assert Demo().weights is not Demo().weights, "each has its own list"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["m", "a", "b"], {"model": "m", "paths": ["a", "b"]}),
        (["m", "--max-steps", "1_000"], {"model": "m", "max_steps": 1000}),
        (["--max-steps=5", "m"], {"model": "m", "max_steps": 5}),
        (["m", "a", "--rate", "1e-3", "b"], {"model": "m", "paths": ["a", "b"], "rate": 0.001}),
        (["m", "--rate", "-2"], {"model": "m", "rate": -2.0}),
        (["m", "--no-dedup", "--skip-bad"], {"model": "m", "dedup": False, "skip_bad": True}),
        (["m", "--stop", "a", "--stop", "--", "--", "b"], None),
        (["m", "--stop", "a", "--stop=-x"], {"model": "m", "stop": ["a", "-x"]}),
        (["m", "--", "--seed", "-x"], {"model": "m", "paths": ["--seed", "-x"]}),
        (["m", "-"], {"model": "m", "paths": ["-"]}),
        (["m", "-5", "- a list item"], {"model": "m", "paths": ["-5", "- a list item"]}),
        (["m", ""], {"model": "m", "paths": [""]}),
        (["m", "--weights", "3"], {"model": "m", "weights": [3]}),
        (["m", "-k", "7"], {"model": "m", "top_k": 7}),
        (["模型", "文本"], {"model": "模型", "paths": ["文本"]}),
        (["m", "--json", "--offline"], {"model": "m", "json": True, "offline": True}),
    ],
)
def test_flags(arguments: list[str], expected: dict[str, object] | None) -> None:
    if expected is None:
        assert refusal(*arguments).exit_code == 2
    else:
        assert read(*arguments) == Demo(**expected)


@pytest.mark.parametrize(
    ("arguments", "what", "fix"),
    [
        (["m", "--max-step", "3"], "unknown argument --max-step", "did you mean '--max-steps'?"),
        (["m", "--dedup"], "unknown argument --dedup", "did you mean '--no-dedup'?"),
        (["m", "--zzz=3"], "unknown argument --zzz=3", "known: --config"),
        (["m", "-z"], "unknown argument -z", "hanmo demo --help"),
        (["m", "--max-steps", "many"], "--max-steps expects a whole number, not 'many'", ""),
        (["m", "--max-steps", "1.5"], "--max-steps expects a whole number, not '1.5'", ""),
        (["m", "--rate", "fast"], "--rate expects a number, not 'fast'", ""),
        (["m", "--rate", "nan"], "--rate expects a number, not 'nan'", ""),
        (["m", "--size", "mikro"], "--size cannot be 'mikro'", "did you mean 'micro'?"),
        (["m", "--max-steps"], "argument --max-steps: expected one argument", "hanmo demo --help"),
        (["m", "--json=yes"], "argument --json: ignored explicit argument 'yes'", "hanmo demo --help"),
        ([], "MODEL is missing: what to count with", "hanmo demo --help"),
    ],
)
def test_mistakes_on_the_command_line(arguments: list[str], what: str, fix: str) -> None:
    error = refusal(*arguments)
    assert error.what == what and error.where == "hanmo demo"
    assert error.fix.startswith(fix) if fix else not error.fix


def test_too_many_arguments() -> None:
    @dataclass
    class One(CommonSettings):
        path: str = argument("a path", zh="路径", default="here")

    assert parse(One, [], "p").path == "here"
    with pytest.raises(UsageError, match="unknown argument b"):
        parse(One, ["a", "b"], "p")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["m", "--max-step", "3"], "未知参数 --max-step，是否想写 '--max-steps'？"),
        (["m", "--max-steps", "x"], "--max-steps 的值应为整数，而不是 'x'"),
        (["m", "--size", "mikro"], "--size 不能是 'mikro'，是否想写 'micro'？"),
        (["m", "--max-steps"], "--max-steps 后面缺少值"),
        ([], "缺少参数 MODEL：用什么数"),
    ],
)
def test_mistakes_are_told_in_chinese(arguments: list[str], text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HANMO_LANG", "zh")
    assert str(refusal(*arguments)) == f"hanmo demo: {text}"


# Recipes -------------------------------------------------------------------------------------------------------------


def test_a_flag_wins_over_the_recipe_and_the_recipe_over_the_default(recipe) -> None:  # type: ignore[no-untyped-def]
    path = recipe("max_steps: 3\nrate: 2\ndedup: false\n")
    settings = read("m", "--config", path, "--rate", "7")
    assert (settings.max_steps, settings.rate, settings.dedup, settings.size) == (3, 7.0, False, "nano")


def test_a_recipe_may_give_everything(recipe) -> None:  # type: ignore[no-untyped-def]
    path = recipe("model: m\npaths: [a, 第二]\nskip-bad: true\nstop: one\nweights: [4]\nsize: micro\nmax_steps:\n")
    expected = Demo(config=path, model="m", paths=["a", "第二"], skip_bad=True, stop=["one"], weights=[4], size="micro")
    assert read("--config", path) == expected
    assert read("--config", path, "other").model == "other"


def test_an_empty_recipe_changes_nothing(recipe) -> None:  # type: ignore[no-untyped-def]
    assert read("m", "--config", recipe("# nothing yet\n")).size == "nano"


@pytest.mark.parametrize(
    ("text", "line", "what", "fix"),
    [
        ("seed: 1\nrat: 2\n", 1, "unknown setting 'seed'", "known: "),
        ("rate: 1\nmax-step: 2\n", 2, "unknown setting 'max-step'", "did you mean 'max_steps'?"),
        ("config: other.yaml\n", 1, "unknown setting 'config'", "known: "),
        ("3: 4\n", 1, "unknown setting '3'", "known: "),
        ("\nmax_steps: many\n", 2, "max_steps expects a whole number, not 'many'", ""),
        ("max_steps: 1.5\n", 1, "max_steps expects a whole number, not 1.5", ""),
        ("max_steps: true\n", 1, "max_steps expects a whole number, not True", ""),
        ("max_steps: [1]\n", 1, "max_steps expects a whole number, not [1]", ""),
        ("skip_bad: 1\n", 1, "skip_bad expects true or false, not 1", ""),
        ("rate: .inf\n", 1, "rate expects a number, not inf", ""),
        ("model: no\n", 1, "model expects a text (in quotes where it looks like something else), not False", ""),
        ("stop: [{a: b}]\n", 1, "stop expects a text (in quotes where it looks like something else)", ""),
        ("size: huge\n", 1, "size cannot be 'huge'", "known: micro, nano"),
        ("rate: 1\nstop: [a\n", 3, "the recipe is not valid YAML", ""),
        ("a: !!python/object:os.system {}\n", 1, "the recipe is not valid YAML", ""),
    ],
)
def test_mistakes_in_a_recipe(recipe, text: str, line: int, what: str, fix: str) -> None:  # type: ignore[no-untyped-def]
    path = recipe(text)
    error = refusal("m", "--config", path)
    assert error.where == f"{path}:{line}"
    assert error.what.startswith(what)
    assert error.fix.startswith(fix) if fix else not error.fix


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"- a\n- b\n", "a recipe is a list of 'key: value' lines"),
        (b"just words\n", "a recipe is a list of 'key: value' lines"),
        (b"rate: \xff\xfe\n", "the recipe is not valid YAML"),
        (b"rate: \x00\n", "the recipe is not valid YAML"),
    ],
)
def test_files_that_are_no_recipe(recipe, content: bytes, what: str) -> None:  # type: ignore[no-untyped-def]
    path = recipe(content)
    error = refusal("m", "--config", path)
    assert error.where.startswith(path) and error.what.startswith(what)


def test_recipes_that_are_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal("m", "--config", str(tmp_path / "no.yaml")).what == "there is no such recipe"
    assert refusal("m", "--config", str(tmp_path)).what.startswith("the recipe cannot be read")
    monkeypatch.setenv("HANMO_LANG", "zh")
    assert "找不到这个配方文件" in str(refusal("m", "--config", "no.yaml"))


# Computed settings ---------------------------------------------------------------------------------------------------


def test_computed_settings_are_recorded_with_their_reason() -> None:
    settings, resolution = Demo(model="m"), Resolution()
    resolution.compute(settings, "max_steps", 40, "fits the budget")
    resolution.compute(settings, "max_steps", 50, "comes too late")
    resolution.compute(settings, "rate", 9.0, "the user gave one")
    assert settings.max_steps == 40 and settings.rate == 0.5
    assert resolution.describe() == "  max_steps = 40  (fits the budget)"
    record = resolution.record(settings)
    assert record["computed"] == {"max_steps": "fits the budget"}
    assert record["settings"]["max_steps"] == 40 and record["settings"]["model"] == "m"


# Help ----------------------------------------------------------------------------------------------------------------


def help_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        read(*arguments)
    assert caught.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    return " ".join(out.split())  # help is wrapped to the width of the terminal


def test_help_in_english(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys, "--help")
    for part in (
        "usage: hanmo demo",
        "MODEL [PATHS ...]",
        "Count things.",
        "how fast: 100% is fast (default: 0.5)",
        "zero is off (default: 0)",
        "-k TOP_K, --top-k TOP_K",
        "--size {nano,micro} how large (default: nano)",
        "--no-dedup keep copies --skip-bad",
        "--max-steps MAX_STEPS at most so many --rate",
        "--stop TEXT",
    ):
        assert part in text.replace("--top-k TOP_K, -k TOP_K", "-k TOP_K, --top-k TOP_K"), part


def test_help_in_chinese(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HANMO_LANG", "zh")
    text = help_of(capsys, "m", "-h", "--unknown")
    for part in ("用法：hanmo demo", "速度：100% 为快（默认：0.5）", "--no-dedup 保留重复 --skip-bad", "显示本说明"):
        assert part in text
    for word in ("usage", "options", "positional", "show", "default"):
        assert word not in text


@pytest.mark.parametrize("verb", VERBS)
def test_every_setting_is_explained_in_both_languages(verb: str) -> None:
    for item in dataclasses.fields(settings_class(load_verb(verb))):
        meta = item.metadata
        assert meta.get("help"), f"{verb} {item.name}: no help"
        assert any("\u4e00" <= char <= "\u9fff" for char in meta["zh"]), f"{verb} {item.name}: no Chinese help"
        assert meta["help"][0].islower() or not meta["help"][0].isalpha() or meta["help"][:2].isupper()
        assert not meta["help"].endswith(".")


# Durations -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90s", 90),
        ("3min", 180),
        ("1.5h", 5400),
        ("1h30m", 5400),
        ("1h 30 min", 5400),
        ("180", 180),
        (" 2 Minutes ", 120),
        ("3分钟", 180),
        ("3 分", 180),
        ("1小时30分钟", 5400),
        ("45秒", 45),
        ("0.5", 0.5),
    ],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "0", "0s", "-3s", "soon", "3 apples", "min", "3min5", "1 2", "1:30", "5 5min", "1e3s"]
)
def test_what_is_no_duration(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="is not a duration"):
        parse_duration(text)
    monkeypatch.setenv("HANMO_LANG", "zh")
    with pytest.raises(UsageError) as caught:
        parse_duration(text)
    assert "不是时长" in str(caught.value)


@given(
    st.lists(st.tuples(st.integers(1, 10**6), st.sampled_from(sorted(UNITS))), min_size=1, max_size=4),
    st.sampled_from(["", " "]),
)
def test_durations_are_the_sum_of_their_parts(parts: list[tuple[int, str]], space: str) -> None:
    text = space.join(f"{amount}{space}{unit}" for amount, unit in parts)
    assert parse_duration(text) == sum(amount * UNITS[unit] for amount, unit in parts)


@given(st.text(max_size=20))
def test_any_text_is_a_positive_duration_or_an_error(text: str) -> None:
    with contextlib.suppress(UsageError):
        assert parse_duration(text) > 0
