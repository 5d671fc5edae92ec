"""Typed settings: one dataclass per verb is the only source of its flags, recipe keys and documentation.

A verb declares its settings like this::

    @dataclass
    class CountSettings(CommonSettings):
        path: str = argument("what to count", zh="要统计的文件")
        limit: int | None = option(None, "at most so many; default: all", zh="上限；默认全部")

From it come the command line (``hanmo count PATH --limit 3``), the YAML recipe (``limit: 3``) and ``docs/cli.md``.
A field whose default is ``None`` is *computed*: the verb fills it in with :meth:`Resolution.compute`, which records the
reason, prints it and stores it in the run.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import types
import typing
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from hanmo.errors import UsageError, nearest
from hanmo.language import pick

T = TypeVar("T")


def option(
    default: Any, help: str, *, zh: str = "", choices: tuple[str, ...] = (), metavar: str = "", short: str = ""
) -> Any:
    """Declare a flag: ``default`` value, English and Chinese help, and the allowed values if few."""
    metadata = {"help": help, "zh": zh, "choices": choices, "metavar": metavar, "short": short, "positional": False}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def argument(help: str, *, zh: str = "", default: Any = MISSING, many: bool = False, metavar: str = "") -> Any:
    """Declare a positional argument; one with a ``default`` may be left out; ``many`` takes several."""
    metadata = {"help": help, "zh": zh, "choices": (), "metavar": metavar, "short": "", "positional": True, "many": many}
    if many:
        return field(default_factory=lambda: list(default) if default is not MISSING else [], metadata=metadata)
    return field(default=default if default is not MISSING else "", metadata={**metadata, "required": default is MISSING})


@dataclass
class CommonSettings:
    """Settings that every verb understands."""

    config: str | None = option(
        None, "read settings from a YAML recipe; flags override it", zh="从 YAML 配方读取设置；命令行优先", metavar="FILE"
    )
    json: bool = option(
        False, "print one JSON document on standard output and nothing else there", zh="标准输出只打印一个 JSON 文档"
    )
    offline: bool = option(False, "never use the network", zh="绝不使用网络")


@dataclass
class Choice:
    """A computed default: the name of the setting, its value, and the reason for it."""

    name: str
    value: Any
    reason: str

    def __str__(self) -> str:
        return f"{self.name} = {self.value}  ({self.reason})"


@dataclass
class Resolution:
    """The settings in force and the reasons of those that were computed."""

    choices: list[Choice] = field(default_factory=list)

    def compute(self, settings: Any, name: str, value: Any, reason: str) -> None:
        """Set ``settings.name`` to ``value`` unless the user gave one, and record the reason."""
        if getattr(settings, name) is None:
            setattr(settings, name, value)
            self.choices.append(Choice(name, value, reason))

    def describe(self) -> str:
        """One line per computed setting: name, value, reason."""
        return "\n".join(f"  {choice}" for choice in self.choices)

    def record(self, settings: Any) -> dict[str, Any]:
        """All settings and the reasons of the computed ones, as plain data for the run's folder."""
        return {
            "settings": dataclasses.asdict(settings),
            "computed": {choice.name: choice.reason for choice in self.choices},
        }


def flag(name: str) -> str:
    """``max_steps`` -> ``--max-steps``."""
    return "--" + name.replace("_", "-")


def base_type(annotation: Any) -> tuple[Any, bool]:
    """Strip ``| None`` and ``list[...]``: return the element type and whether the field is a list."""
    origin = typing.get_origin(annotation)
    if origin in (Union, types.UnionType):
        inner = [a for a in typing.get_args(annotation) if a is not type(None)]
        return base_type(inner[0])
    if origin is list:
        return typing.get_args(annotation)[0], True
    return annotation, False


def convert(value: Any, annotation: Any, name: str, source: str, choices: tuple[str, ...] = ()) -> Any:
    """Turn a flag's text or a recipe's value into the field's type.

    Raises:
        UsageError: the value does not fit; the message names the setting and what it expects.
    """
    kind, is_list = base_type(annotation)
    if value is None:
        return None
    if is_list:
        items = value if isinstance(value, list) else [value]
        return [convert(item, kind, name, source, choices) for item in items]
    try:
        if kind is bool:
            if isinstance(value, bool):
                return value
            raise ValueError
        if kind is int:
            if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
                raise ValueError
            return int(str(value).replace("_", "")) if isinstance(value, str) else int(value)
        if kind is float:
            if isinstance(value, bool):
                raise ValueError
            return float(value)
        text = str(value)
    except (ValueError, TypeError):
        wanted = {bool: "true or false", int: "a whole number", float: "a number"}.get(kind, "text")
        raise UsageError(
            f"{name} expects {wanted}, not {value!r}", where=source, zh=f"{name} 的值 {value!r} 不合要求（应为 {wanted}）"
        ) from None
    if choices and text not in choices:
        raise UsageError(f"{name} cannot be {text!r}", where=source, fix=nearest(text, choices))
    return text


def type_hints(cls: type) -> dict[str, Any]:
    """The resolved annotations of a settings dataclass."""
    return typing.get_type_hints(cls)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are :class:`UsageError` with the nearest known flag."""

    def error(self, message: str) -> typing.NoReturn:
        match = re.search(r"unrecognized arguments: (\S+)", message)
        if match:
            known = [o for action in self._actions for o in action.option_strings if o.startswith("--")]
            given = match[1].split("=")[0]
            fix = nearest(given, known) if given.startswith("--") else f"{self.prog} --help"
            raise UsageError(f"unknown argument {match[1]}", where=self.prog, fix=fix, zh=f"未知参数 {match[1]}：{fix}")
        raise UsageError(message, where=self.prog, fix=f"{self.prog} --help")


def build_parser(cls: type, prog: str, description: str) -> Parser:
    """The command line of a settings dataclass. Every default is absent, so that a given flag can be told apart."""
    parser = Parser(prog=prog, description=description, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    hints = type_hints(cls)
    for item in dataclasses.fields(cls):
        meta = item.metadata
        if "help" not in meta:
            continue
        kind, is_list = base_type(hints[item.name])
        help_text = pick(meta["help"], meta["zh"])
        default = item.default
        if default not in (MISSING, None, False, "") and not meta["positional"]:
            help_text += pick(f" (default: {default})", f"（默认：{default}）")
        help_text = help_text.replace("%", "%%")
        if meta["positional"]:
            many = meta.get("many")
            nargs: Any = "*" if many else (None if meta.get("required") else "?")
            parser.add_argument(item.name, nargs=nargs, help=help_text, metavar=meta["metavar"] or item.name.upper())
            continue
        names = [flag(item.name)] + ([meta["short"]] if meta["short"] else [])
        if kind is bool:
            if item.default is True:
                names = [flag("no_" + item.name)]
                parser.add_argument(*names, dest=item.name, action="store_false", help=help_text)
            else:
                parser.add_argument(*names, dest=item.name, action="store_true", help=help_text)
            continue
        metavar = meta["metavar"] or ("{" + ",".join(meta["choices"]) + "}" if meta["choices"] else item.name.upper())
        parser.add_argument(
            *names, dest=item.name, help=help_text, metavar=metavar, action="append" if is_list else "store"
        )
    return parser


def read_recipe(path: str, cls: type) -> dict[str, Any]:
    """Read a YAML recipe for a verb; unknown keys are refused with the nearest known one.

    Raises:
        UsageError: the file is missing, is not a mapping, or has a key or value the verb does not know.
    """
    import yaml

    hints = type_hints(cls)
    fields = {item.name: item for item in dataclasses.fields(cls)}
    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError("there is no such recipe", where=path, zh="找不到这个配方文件") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else path
        raise UsageError(f"the recipe is not valid YAML: {getattr(error, 'problem', error)}", where=where) from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise UsageError("a recipe is a list of 'key: value' lines", where=path, fix="for example  seed: 1")
    values: dict[str, Any] = {}
    for key, value in loaded.items():
        name = str(key).replace("-", "_")
        if name not in fields or name == "config":
            known = [n for n in fields if n != "config"]
            raise UsageError(f"unknown setting '{key}'", where=path, fix=nearest(name, known), zh=f"未知设置 '{key}'")
        choices = fields[name].metadata.get("choices", ())
        values[name] = convert(value, hints[name], name, path, choices)
    return values


def parse(cls: type[T], arguments: list[str], prog: str, description: str = "") -> T:
    """Parse the command line of a verb: defaults, then the recipe, then the flags.

    Raises:
        UsageError: unknown flag, key or value, or a missing argument.
    """
    hints = type_hints(cls)
    parser = build_parser(cls, prog, description or (cls.__doc__ or "").strip())
    given, unknown = parser.parse_known_args(arguments)
    if unknown:
        parser.error(f"unrecognized arguments: {unknown[0]}")
    flags = {name: value for name, value in vars(given).items() if value is not None and value != []}
    values: dict[str, Any] = read_recipe(flags["config"], cls) if "config" in flags else {}
    for item in dataclasses.fields(cls):  # type: ignore[arg-type]
        if item.name in flags:
            choices = item.metadata.get("choices", ())
            values[item.name] = convert(flags[item.name], hints[item.name], flag(item.name), prog, choices)
    return cls(**values)


def parse_duration(text: str) -> float:
    """Seconds in a budget such as ``90s``, ``3min``, ``1.5h`` or plain ``180``.

    >>> parse_duration("3min"), parse_duration("1h30m"), parse_duration("45")
    (180.0, 5400.0, 45.0)
    """
    units = {"s": 1, "sec": 1, "m": 60, "min": 60, "h": 3600, "hour": 3600, "hours": 3600, "秒": 1, "分钟": 60, "小时": 3600}
    compact = text.strip().lower().replace(" ", "")
    parts = re.findall(r"(\d+(?:\.\d+)?)(hours|hour|min|sec|分钟|小时|秒|h|m|s)?", compact)
    seconds = sum(float(number) * units[unit or "s"] for number, unit in parts)
    if not parts or "".join(number + unit for number, unit in parts) != compact or seconds <= 0:
        raise UsageError(f"'{text}' is not a duration", fix="write 90s, 3min or 1h", zh=f"'{text}' 不是时长，请写 90s、3min 或 1h")
    return seconds


def notice(message: str) -> None:
    """Tell the user something on standard error; standard output belongs to results."""
    print(message, file=sys.stderr, flush=True)


__all__ = [
    "Choice",
    "CommonSettings",
    "Literal",
    "Resolution",
    "argument",
    "notice",
    "option",
    "parse",
    "parse_duration",
]
