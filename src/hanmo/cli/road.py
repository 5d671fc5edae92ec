"""The main road that several verbs walk: corpus, tokenizer, training; each step is printed with its reasons."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hanmo import __version__
from hanmo.data.settings import DataSettings
from hanmo.errors import ModelError, UsageError, nearest
from hanmo.folder import make_folder, read_json, write_json
from hanmo.language import pick
from hanmo.settings import CommonSettings, Resolution, flag, notice, option
from hanmo.text.settings import TokenizerSettings
from hanmo.training.settings import TrainingSettings

if TYPE_CHECKING:
    import torch

    from hanmo.data.corpus import Corpus
    from hanmo.data.sentences import WordCorpus
    from hanmo.data.tokens import TokenCorpus
    from hanmo.text.tokenizer import Tokenizer
    from hanmo.training.fit import FitResult
    from hanmo.training.plan import Machine, Plan
    from hanmo.training.processes import Processes
    from hanmo.training.trackers import Tracker


NOT_DECISIVE = {  # settings that change how a run is done, not what comes out of it
    "resume",
    "checkpoint_every",
    "device",
    "devices",
    "shard",
    "activation_checkpointing",
    "micro_batch",
    "keep_best",
    "track",
    "search",
}


@dataclass
class RoadSettings(CommonSettings, DataSettings, TokenizerSettings, TrainingSettings):
    """Everything that decides a trained model: data, tokenizer, training."""

    out: str | None = option(
        None, "folder of the run; default: runs/<name of the data>", zh="输出目录；默认 runs/<数据名>"
    )
    overwrite: bool = option(False, "start anew where the folder holds an earlier run", zh="目录中已有运行时重新开始")
    seed: int = option(0, "seed of everything random: split, weights, data order", zh="一切随机过程的种子")

    def check(self) -> None:
        """Raise UsageError for values that cannot work, before any file is read."""
        super().check()
        self.check_training()


class RunFolderSettings(Protocol):
    """What decides where a run lies and what may happen to an earlier one there."""

    out: str | None
    overwrite: bool
    resume: bool

    def check(self) -> None: ...


@dataclass
class Texts:
    """What a model is trained on: token ids of every split, and the tokenizer that made them.

    ``corpus`` is where the tokens are from; None for a word-level corpus, whose files are taken as they are.
    """

    corpus: Corpus | None
    tokens: TokenCorpus | WordCorpus
    tokenizer: Tokenizer

    def record(self) -> dict[str, str]:
        """Fingerprints for the provenance of a model."""
        return {"corpus": self.tokens.manifest["corpus"], "tokenizer": self.tokenizer.fingerprint}


@dataclass
class TrainedRun:
    """What a training run leaves: its folder, texts and tokenizer, its plan, and how it ended."""

    run: Path
    texts: Texts
    plan: Plan
    result: FitResult
    record: dict[str, Any]

    @property
    def model_folder(self) -> Path:
        """Where the model lies."""
        return self.run / "model"

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the model."""
        return self.texts.tokenizer


def choose_out(settings: RunFolderSettings, paths: list[str]) -> Path:
    """The folder of the run: ``--out``, else ``runs/`` and the name of the first path."""
    if settings.out:
        return Path(settings.out)
    name = Path(paths[0]).resolve().name.split(".")[0] if paths else "python-stdlib"
    return Path("runs") / (name or "corpus")


def refuse_finished_run(run: Path, settings: RunFolderSettings) -> None:
    """Never write over a model or its checkpoints by accident, and never over what is not a run of ours.

    Raises:
        UsageError: the folder holds a run, and neither ``--resume`` nor ``--overwrite`` says what to do with it; or it
            holds other files under the names of a run.
    """
    held = [name for name in ("model", "checkpoints", "log.jsonl") if (run / name).exists()]
    if held and not (run / "settings.json").is_file():
        raise UsageError(
            f"this folder is not a run, and holds '{held[0]}', which would be lost",
            where=str(run),
            fix="choose an empty or new folder with --out",
            zh=f"这个文件夹不是一次运行，其中的 '{held[0]}' 会被覆盖。请用 --out 另选一个空文件夹",
        )
    checkpoints = run / "checkpoints"
    finished = "model" in held or (checkpoints.is_dir() and any(checkpoints.iterdir()))
    if finished and not settings.resume and not settings.overwrite:
        raise UsageError(
            "this folder holds an earlier run",
            where=str(run),
            fix="--resume goes on with it, --overwrite starts anew, --out names another place",
            zh="该目录中已有一次运行：--resume 继续，--overwrite 重新开始，--out 换一个位置",
        )


def clear_run(run: Path) -> None:
    """Remove what belongs to an earlier run; its model stays until the new one replaces it."""
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    for name in ("log.jsonl", "search.json", "trackers.json"):
        (run / name).unlink(missing_ok=True)


def prepare_corpus(paths: list[str], settings: DataSettings, folder: Path, *, unchanged: bool = False) -> Corpus:
    """Read, clean and split the texts (the standard library's sources if there are none), or reuse an equal corpus.

    Args:
        paths: files, folders and globs; or one folder that ``hanmo data`` wrote.
        folder: where the prepared corpus is written.
        unchanged: the corpus that stands at ``folder`` must be of these texts and settings; it is never replaced.

    Raises:
        UsageError: settings for a corpus that is already prepared.
        ModelError: ``unchanged``, and texts or settings differ.
    """
    from hanmo.data.corpus import Corpus
    from hanmo.data.prepare import prepare, reuse
    from hanmo.data.report import describe
    from hanmo.data.stdlib import stdlib_paths

    settings.check()
    if len(paths) == 1 and (Path(paths[0]) / "hanmo.json").is_file() and (Path(paths[0]) / "report.json").is_file():
        corpus = Corpus.open(paths[0])
        refuse_late_settings(corpus, settings)
    else:
        if not paths:
            notice(
                pick(
                    "no path given: using the sources of Python's own standard library",
                    "未给出路径：使用 Python 标准库自身的源代码",
                )
            )
        sources = paths or stdlib_paths()
        if unchanged and (folder / "report.json").exists():
            found = reuse(sources, folder, settings)
            if found is None:
                raise other_recipe(folder.parent)
            corpus = found
        else:
            corpus = prepare(sources, folder, settings)
    notice(describe(corpus.report))
    return corpus


def refuse_late_settings(corpus: Corpus, settings: DataSettings) -> None:
    """Settings of data preparation mean nothing for a corpus that is already prepared: say so.

    Raises:
        UsageError: one was given that differs from those the corpus was prepared with.
    """
    usual, made, given = DataSettings().data_record(), corpus.manifest["settings"], settings.data_record()
    late = [name for name in given if name != "seed" and given[name] not in (usual[name], made.get(name))]
    if late:
        raise UsageError(
            f"{flag(late[0])} comes too late: this corpus is already prepared",
            where=str(corpus.folder),
            fix="give the texts themselves, or prepare them anew with hanmo data",
            zh=f"语料已处理完毕，{flag(late[0])} 不再起作用。请直接给出原始文本，或用 hanmo data 重新处理",
        )


def other_recipe(run: Path) -> ModelError:
    """The error for a resumption with other texts or settings than the first start had."""
    return ModelError(
        "this run was begun with other texts or settings",
        where=str(run),
        fix="give the command of the first start and --resume, or choose another --out",
        zh="该运行开始时使用的是另一套文本或设置。请用最初的命令加 --resume，或更换 --out",
    )


def spread(corpus: Corpus, max_bytes: int) -> Iterator[str]:
    """Training text for the tokenizer: all of it, or every k-th piece so that about ``max_bytes`` pass."""
    every = max(1, -(-corpus.num_bytes("train") // max_bytes))
    return (text for text, _ in islice(corpus.pieces("train"), 0, None, every))


def make_tokenizer(corpus: Corpus, settings: TokenizerSettings, resolution: Resolution, size: str) -> Tokenizer:
    """Train the tokenizer on the training split for a model of this size, or load the one that was named."""
    from hanmo.text.training import SAMPLE_BYTES, train_bpe, train_char
    from hanmo.training.plan import choose_vocabulary

    if settings.tokenizer == "char":
        return train_char(spread(corpus, SAMPLE_BYTES))
    if settings.tokenizer != "bpe":
        return named_tokenizer(settings.tokenizer)
    chinese = corpus.report["languages"].get("zh", 0.0)
    resolution.compute(settings, "vocab_size", *choose_vocabulary(size, chinese_share=chinese))
    assert settings.vocab_size is not None
    return train_bpe(spread(corpus, SAMPLE_BYTES), settings.vocab_size)


def named_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a folder or of a model.

    Raises:
        UsageError: neither a kind of tokenizer nor a folder or model.
    """
    from hanmo import catalog
    from hanmo.inference.loading import RUNS, load_tokenizer

    if not Path(name).expanduser().exists() and not (RUNS / name).exists() and catalog.entry(name) is None:
        fix = nearest(name, ("bpe", "char", "words"))
        raise UsageError(
            f"there is no tokenizer '{name}'", where="--tokenizer", fix=fix, zh=f"没有分词器 '{name}'，{fix}"
        )
    return load_tokenizer(name)


def recipe_fingerprint(settings: RoadSettings, tokens: TokenCorpus | WordCorpus, plan: Plan) -> str:
    """Hash of all that decides the weights: data, tokenizer, network and schedule. Horizons in time count too."""
    from hanmo.models.recurrent import RecurrentConfig
    from hanmo.training.settings import TrainingSettings

    names = {item.name for item in fields(TrainingSettings)} - NOT_DECISIVE
    names -= {"architecture", "order", "dropout"}  # the network says them
    decisive = {name: getattr(settings, name) for name in sorted(names)}
    if decisive["epochs"] is None:
        del decisive["epochs"]
    identity = {key: tokens.manifest[key] for key in ("tokenizer", "corpus")}
    network = plan.config.to_dict() if isinstance(plan.config, RecurrentConfig) else plan.config.to_hf()
    text = json.dumps([decisive, identity, network], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextmanager
def open_run(paths: list[str], settings: RunFolderSettings) -> Iterator[Path]:
    """The folder of the run, held for this process alone while the block lasts.

    Raises:
        UsageError: another process writes to it, or it holds what would be lost.
    """
    from hanmo.training.checkpoint import run_lock

    settings.check()
    run = choose_out(settings, paths)
    refuse_finished_run(run, settings)  # before anything is written there
    make_folder(run)
    with run_lock(run):
        refuse_finished_run(run, settings)  # again: another process may have finished a run in between
        yield run


@dataclass
class Prepared:
    """What stands before the training begins."""

    texts: Texts
    plan: Plan
    record: dict[str, Any]
    machine: Machine


def prepare_run(
    run: Path,
    paths: list[str],
    settings: RoadSettings,
    words: dict[str, list[str]] | None,
    processes: Processes,
    device: torch.device,
) -> Prepared:
    """Data, tokenizer and plan; of several processes the first one settles them, the others take them over."""
    from hanmo.cli.fitting import choose_size, make_plan
    from hanmo.cli.words import read_words
    from hanmo.training import plan as dial
    from hanmo.training.acceleration import even_micro_batch
    from hanmo.training.launch import launch_id

    resolution, follower = Resolution(), not processes.main
    restore_choices(run, settings, resolution, always=follower)
    machine = dial.measure_machine(device)
    if words is None:
        corpus = prepare_corpus(paths, settings, run / "data", unchanged=settings.resume or follower)
        size = choose_size(settings, resolution, machine, None)
        kept = run / "tokenizer"  # the others read what the first has trained
        tokenizer = named_tokenizer(str(kept)) if follower else make_tokenizer(corpus, settings, resolution, size)
        if settings.objective == "masked" and not follower:
            from hanmo.training.objectives.words import with_mask

            tokenizer = with_mask(tokenizer)
        if processes.share.count > 1 and not follower:
            tokenizer.save(kept)
        texts = Texts(corpus, corpus.tokenize(tokenizer), tokenizer)
    else:
        texts = read_words(run, words, settings.vocab_size, unchanged=settings.resume or follower)
        choose_size(settings, resolution, machine, texts.tokens.vocab_size)
    plan = make_plan(settings, resolution, texts, machine, device)
    if processes.share.count > 1:
        plan = replace(plan, micro_batch=even_micro_batch(plan.batch_size, plan.micro_batch, processes.share.count))
    if warning := plan.warning(len(texts.tokens.tokens("train"))):
        notice(warning)
    notice(pick("settings that were computed:", "自动选择的设置：") + "\n" + resolution.describe())
    recipe = recipe_fingerprint(settings, texts.tokens, plan)
    record = {**resolution.record(settings), "recipe": recipe, "launch": launch_id(), **versions()}
    if follower:
        return Prepared(texts, plan, record, machine)
    if settings.resume:
        refuse_other_recipe(run, recipe)
    else:  # only now: a mistake in the paths or settings must not cost the earlier run
        clear_run(run)
    write_json(run / "settings.json", record)
    return Prepared(texts, plan, record, machine)


def train_run(
    run: Path,
    paths: list[str],
    settings: RoadSettings,
    processes: Processes,
    device: torch.device,
    words: dict[str, list[str]] | None = None,
) -> TrainedRun:
    """Data, tokenizer and training; ends with the model folder at ``<run>/model``.

    Args:
        run, processes, device: what :func:`hanmo.cli.together.run_together` gives.
        words: the files of each split of a word-level corpus, which is not cleaned and not divided; ``paths`` are then
            not read.

    Raises:
        HanmoError: whatever goes wrong on the way. Until the training starts, an earlier run in the folder is intact.
    """
    from hanmo.cli.fitting import fit, save_model
    from hanmo.cli.searching import search_pretraining
    from hanmo.evaluation.training_report import TrainingReport
    from hanmo.training.search_record import FILE, SearchRecord
    from hanmo.training.trackers import open_trackers

    prepared: Prepared = processes.first_main(lambda: prepare_run(run, paths, settings, words, processes, device))
    prepared = search_pretraining(run, settings, prepared, device)
    # each process measured the machine for itself, and from these follows when all of them evaluate
    measured = ("max_tokens", "tokens", "tokens_per_second", "expected_seconds")
    common: dict[str, Any] = {name: processes.decide(getattr(prepared.plan, name)) for name in measured}
    prepared = replace(prepared, plan=replace(prepared.plan, **common))
    record, plan = prepared.record, prepared.plan
    report = TrainingReport(
        run,
        plan=plan.rows(),
        settings=record["settings"],
        computed=record["computed"],
        versions=versions(),
        search=SearchRecord.read(run / FILE),
    )
    trackers: tuple[Tracker, ...] = ()
    if processes.main:
        trackers = (report, *open_trackers(settings.track, run, record["settings"], offline=settings.offline))
    try:
        model, result = fit(run, settings, prepared, processes, device, trackers)
    finally:
        for tracker in trackers:
            tracker.close()
    trained = TrainedRun(run, prepared.texts, plan, result, record)
    save_model(trained, model, processes)
    return trained


def restore_choices(run: Path, settings: RunFolderSettings, resolution: Resolution, *, always: bool = False) -> None:
    """On ``--resume``, take over what was computed at the first start: the machine may be busier or idler now."""
    path = run / "settings.json"
    if not ((settings.resume or always) and path.is_file()):
        return
    record = read_json(path)
    for name, reason in record["computed"].items():  # recorded again, so that a second --resume finds them too
        resolution.compute(settings, name, record["settings"][name], reason)


def refuse_other_recipe(run: Path, recipe: str) -> None:
    """A resumption goes on with what was begun, or not at all.

    Raises:
        ModelError: the run was begun with other texts or settings.
    """
    path = run / "settings.json"
    if path.is_file() and read_json(path).get("recipe") != recipe:
        raise other_recipe(run)


def versions() -> dict[str, str]:
    """What a run was made with."""
    import torch

    return {"hanmo": __version__, "python": platform.python_version(), "torch": torch.__version__}
