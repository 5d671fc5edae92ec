"""The command ``hanmo``: finds the verb, reads its settings, runs it, and turns errors into messages and exit codes."""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from types import ModuleType
from typing import Any

from hanmo import __version__
from hanmo.errors import HanmoError, Interrupted, UsageError, nearest
from hanmo.language import pick
from hanmo.settings import notice, parse

VERBS = ("build", "data", "tokenizer", "pretrain", "evaluate", "generate", "chat", "serve", "doctor")


def load_verb(name: str) -> ModuleType:
    """The module of a verb. Every such module imports in milliseconds: heavy packages are imported when it runs."""
    return importlib.import_module(f"hanmo.cli.{name}")


def settings_class(verb: ModuleType) -> type[Any]:
    """The dataclass that declares a verb's settings."""
    declared = [
        item
        for name, item in vars(verb).items()
        if name.endswith("Settings") and getattr(item, "__module__", "") == verb.__name__
    ]
    assert len(declared) == 1, f"{verb.__name__} must declare one settings class"
    return declared[0]


def usage() -> str:
    """The text of ``hanmo --help``."""
    lines = [
        pick(
            f"hanmo {__version__}: from a folder of text to a language model you can measure and talk to.",
            f"翰墨 hanmo {__version__}：从一个文件夹的文本，到可以度量、可以对话的语言模型。",
        ),
        "",
        pick("usage: hanmo VERB [options]     hanmo VERB --help", "用法：hanmo 动词 [选项]     hanmo 动词 --help"),
        "",
    ]
    for name in VERBS:
        verb = load_verb(name)
        lines.append(f"  {name:<10}  {pick(verb.HELP, verb.HELP_ZH)}")
    lines += [
        "",
        pick("for example:", "例如："),
        "  hanmo build my-texts/ --budget 3min",
        "  hanmo chat runs/my-texts",
        "  hanmo serve runs/my-texts",
    ]
    return "\n".join(lines)


def run_verb(arguments: list[str]) -> int:
    """Run one command line and return its exit code.

    Raises:
        HanmoError: anything the user can do something about.
    """
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"hanmo {__version__}")
        return 0
    name = arguments[0]
    if name not in VERBS:
        raise UsageError(f"unknown verb '{name}'", where="hanmo", fix=nearest(name, VERBS), zh=f"未知动词 '{name}'")
    verb = load_verb(name)
    settings = parse(settings_class(verb), arguments[1:], f"hanmo {name}", pick(verb.HELP, verb.HELP_ZH))
    if settings.offline:
        os.environ["HANMO_OFFLINE"] = "1"
        os.environ["HF_HUB_OFFLINE"] = "1"
    outcome = verb.run(settings)
    if outcome is not None:
        print(json.dumps(outcome.data, ensure_ascii=False) if settings.json else outcome.text)
    return 0


def report_error(error: HanmoError, as_json: bool) -> None:
    """Show an error to a person on standard error, and to a program on standard output if it asked for JSON."""
    label = pick("stopped", "已停止") if isinstance(error, Interrupted) else pick("error", "错误")
    notice(f"{label}: {error}")
    if as_json:
        fields = {"what": error.what, "where": error.where, "why": error.why, "fix": error.fix}
        print(json.dumps({"error": {**fields, "exit_code": error.exit_code}}, ensure_ascii=False))


def main(arguments: list[str] | None = None) -> int:
    """The entry point; see :mod:`hanmo.errors` for the exit codes."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        return run_verb(given)
    except HanmoError as error:
        report_error(error, "--json" in given)
        return error.exit_code
    except KeyboardInterrupt:
        notice(pick("stopped", "已停止"))
        return Interrupted.exit_code
    except BrokenPipeError:  # the reader of our output went away, as in `hanmo ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except SystemExit as leaving:  # argparse prints --help and leaves
        return int(leaving.code or 0)
    except Exception:
        traceback.print_exc()
        notice(
            pick(
                "this is a defect in Hanmo: please report it with the lines above",
                "这是 Hanmo 自身的缺陷：请附上以上内容报告给我们",
            )
        )
        return 1


if __name__ == "__main__":
    sys.exit(main())
