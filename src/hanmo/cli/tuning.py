"""The stages of a fine-tuning: records, base model, objective, training, and the folders that it leaves."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hanmo.cli.finetune import FinetuneSettings
from hanmo.cli.fitting import loop_settings, use_precision
from hanmo.cli.goals import HEADS, Goal, settle_micro_batch
from hanmo.cli.road import NOT_DECISIVE, clear_run, refuse_other_recipe, restore_choices, versions
from hanmo.cli.together import prepare_model
from hanmo.errors import ModelError
from hanmo.folder import write_json
from hanmo.language import pick
from hanmo.settings import Resolution, notice

if TYPE_CHECKING:
    import torch

    from hanmo.models.checkpoints.weights import LoadedModel
    from hanmo.models.transformer import Transformer
    from hanmo.text.tokenizer import Tokenizer
    from hanmo.training.estimates import Estimate
    from hanmo.training.fit import FitResult, FitSettings
    from hanmo.training.objectives import Objective
    from hanmo.training.plan_tuning import Horizon
    from hanmo.training.preflight import Preflight
    from hanmo.training.processes import Processes
    from hanmo.training.trackers import Tracker

KINDS = {  # the records of each task
    "classification": "labelled",
    "tagging": "tagged",
    "question-answering": "question_answer",
    "seq2seq": "pair",
    "instructions": "dialogue",
    "preferences": "preference",
    "embeddings": "similar",
}
VALIDATION_SHARE = 0.1
ADAPTER = "default"
POOLING_FILES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling")


@dataclass
class Tuned:
    """What a fine-tuning leaves."""

    model_folder: Path
    adapter_folder: Path | None
    result: FitResult


@dataclass
class Splits:
    """The records to train and to validate on, and the hash of all of them."""

    train: list[Any]
    validation: list[Any]
    digest: str


@dataclass
class Base:
    """The model to begin with: where it lies, its parts, and the hash of its weights as they were stored."""

    path: Path
    loaded: LoadedModel
    model: Transformer
    tokenizer: Tokenizer
    fingerprint: str
    new_head: bool


def tune(run: Path, settings: FinetuneSettings, processes: Processes, device: torch.device) -> Tuned:
    """Fine-tune in the folder that this process holds; ends with the model folder at ``<run>/model``.

    Raises:
        HanmoError: whatever goes wrong on the way. Until the training starts, an earlier run in the folder is intact.
    """
    from hanmo.evaluation.training_report import TrainingReport
    from hanmo.training.acceleration import even_micro_batch
    from hanmo.training.fit import Trainer
    from hanmo.training.launch import launch_id
    from hanmo.training.plan_tuning import WARMUP, choose_tuning, tuning_optimizer
    from hanmo.training.preflight import wants_colour
    from hanmo.training.trackers import open_trackers

    resolution = Resolution()

    def read() -> tuple[Splits, Base, int, Goal]:
        restore_choices(run, settings, resolution)
        splits = read_splits(settings)
        base = load_base(settings, splits)
        trained = choose_weights(base, settings)
        return splits, base, trained, make_goal(run, settings, resolution, base, splits)

    splits, base, trained, goal = processes.first_main(read)  # a mistake in the records is told once
    config = base.model.config
    horizon = choose_tuning(
        settings,
        resolution,
        task=settings.task,
        width=config.hidden_size,
        examples=max(1, goal.examples),
        lora=settings.lora,
    )
    settle_micro_batch(settings, resolution, goal.length, 2 if settings.task == "preferences" else 1)
    assert settings.batch_size is not None and settings.micro_batch is not None
    if processes.share.count > 1:
        settings.micro_batch = even_micro_batch(settings.batch_size, settings.micro_batch, processes.share.count)
    notice(pick("settings that were computed:", "自动选择的设置：") + "\n" + resolution.describe())
    estimate = expected(base, goal, horizon, settings, trained, device)
    estimate.require_memory()
    recipe = recipe_of(settings, base, splits)
    record: dict[str, Any] = {**resolution.record(settings), "recipe": recipe, "launch": launch_id(), **versions()}

    def begin() -> None:
        if settings.resume:
            refuse_other_recipe(run, recipe)
        else:
            clear_run(run)
        write_json(run / "settings.json", record)

    processes.on_main(begin)
    use_precision(base.model, settings.precision, device)
    prepare_model(base.model, settings, device, estimate.seconds)
    base.model.to(device)
    objective = processes.first_main(goal.build)  # the others find what the first computed, such as a reference
    preflight = preflight_of(base, goal, settings, objective, estimate)
    notice(preflight.describe(colour=wants_colour(sys.stderr)))
    objective = with_teacher(settings, objective, base.model, device)
    loop: FitSettings = loop_settings(
        settings,
        tuning_optimizer(settings, new_head=base.new_head),
        recipe,
        horizon.steps,
        horizon.seconds,
        warmup_steps=1,
        warmup=WARMUP,
        cooldown=1.0,
        final=0.0,
    )
    report = TrainingReport(
        run,
        plan={"": estimate.describe()},
        settings=record["settings"],
        computed=record["computed"],
        versions=versions(),
    )
    trackers: tuple[Tracker, ...] = ()
    if processes.main:
        trackers = (report, *open_trackers(settings.track, run, record["settings"], offline=settings.offline))
    try:
        trainer = Trainer(
            base.model,
            objective,
            loop,
            run,
            device=device,
            resume=settings.resume,
            processes=processes,
            trackers=trackers,
        )
        result = trainer.fit()
    finally:
        for tracker in trackers:
            tracker.close()
    return processes.on_main(lambda: save(run, settings, base, goal, record, result)) or Tuned(
        run / "model", None, result
    )


def read_splits(settings: FinetuneSettings) -> Splits:
    """The records to train on, and those to validate on: of a file of their own, or a tenth that shares no text."""
    from hanmo.data.tasks import Shares, check_labels, read_records, split_records

    kind = KINDS[settings.task]
    records = read_records(kind, settings.paths, fields=settings.field_names())
    notice(records.report.describe())
    if settings.validation is not None:
        held_out = read_records(kind, settings.validation, fields=settings.field_names())
        notice(held_out.report.describe())
        train, validation = list(records), list(held_out)
    else:
        split = split_records(records, Shares(validation=VALIDATION_SHARE, test=0.0), settings.seed)
        train, validation = list(split.train), list(split.validation)
    if settings.task in ("classification", "tagging"):
        check_labels(train, validation)
    digest = hashlib.sha256()
    for record in (*train, *validation):
        content = {name: value for name, value in vars(record).items() if name not in ("file", "line")}
        digest.update(repr(sorted(content.items())).encode("utf-8", "surrogatepass"))
    return Splits(train, validation, digest.hexdigest()[:16])


def load_transformer(name: str, *, offline: bool) -> tuple[Path, LoadedModel]:
    """A transformer of any kind and where it lies.

    Raises:
        ModelError: it is a model of another kind.
    """
    import torch

    from hanmo.inference.loading import find
    from hanmo.models.architectures import ARCHITECTURES
    from hanmo.models.checkpoints.gguf import load_gguf
    from hanmo.models.checkpoints.huggingface import load_folder, read_object

    path = find(name, offline=offline)
    if path.is_file():
        return path, load_gguf(path)
    kind = read_object(path / "config.json").get("model_type")
    if kind not in ARCHITECTURES:
        raise ModelError(
            f"a model of the kind '{kind}' cannot be fine-tuned",
            where=name,
            fix="give a transformer: " + ", ".join(ARCHITECTURES),
            zh=f"'{kind}' 类模型不能微调，请给出 transformer 模型",
        )
    return path, load_folder(path, dtype=torch.float32)


def load_base(settings: FinetuneSettings, splits: Splits) -> Base:
    """The base model with the head and the tokens that the task needs."""
    from hanmo.cli.goals import make_head
    from hanmo.models.adapters import weights_fingerprint
    from hanmo.models.architectures import with_head
    from hanmo.models.transformer import Transformer
    from hanmo.text.chat_targets import with_chat_tokens
    from hanmo.training.objectives.instructions import widen

    path, loaded = load_transformer(settings.base, offline=settings.offline)
    config = loaded.config
    probe = Transformer.__new__(Transformer)  # only its configuration is asked for
    probe.__dict__["config"] = config
    head = make_head(settings, probe, splits.train)
    new_head = head is not None and (config.head is None or config.head.labels != head.labels)
    if head is not None and new_head:
        config = with_head(config, head)
    elif head is None and settings.task == "embeddings":
        config = replace(config, lm=False, lm_bias=False, lm_transform=None, head=None)
    model = Transformer(config)
    model.initialize(settings.seed)
    own = model.state_dict()
    given = {
        name: value.float() for name, value in loaded.state.items() if name in own and own[name].shape == value.shape
    }
    missing = [name for name in own if name not in given and not name.startswith("head.")]
    if missing:
        raise ModelError(
            f"the base model lacks '{missing[0]}'",
            where=settings.base,
            zh=f"基础模型缺少 '{missing[0]}'",
        )
    model.load_state_dict({**own, **given})
    fingerprint = weights_fingerprint(model)
    tokenizer = loaded.tokenizer
    if settings.task in ("instructions", "preferences"):
        tokenizer, added = with_chat_tokens(tokenizer)
        if added:
            count = widen(model, tokenizer.vocab_size)
            notice(
                pick(
                    f"the base has no chat template: it gets that of ChatML and the tokens {', '.join(added)} "
                    f"({count} new rows of the embedding)",
                    f"基础模型没有对话模板：使用 ChatML，并加入符号 {'、'.join(added)}（词嵌入新增 {count} 行）",
                )
            )
    return Base(path, loaded, model, tokenizer, fingerprint, new_head)


def choose_weights(base: Base, settings: FinetuneSettings) -> int:
    """Decide what is trained: adapters, the last layers, or everything; returns the number of parameters."""
    from hanmo.models.adapters import LoraConfig, add_adapter, train_only

    if settings.lora:
        added = base.tokenizer.vocab_size > base.loaded.tokenizer.vocab_size
        whole = (*(("head",) if base.model.config.head else ()), *(("embed_tokens",) if added else ()))
        config = LoraConfig(
            settings.rank,
            settings.alpha,
            settings.lora_dropout,
            tuple(settings.targets) or None,
            settings.rslora,
            settings.dora,
            whole,
        )
        add_adapter(base.model, ADAPTER, config, settings.seed)
    elif settings.last_layers is not None:
        train_only(base.model, last_layers=settings.last_layers)
    return sum(p.numel() for p in base.model.parameters() if p.requires_grad)


def make_goal(run: Path, settings: FinetuneSettings, resolution: Resolution, base: Base, splits: Splits) -> Goal:
    """The records as examples of the task's objective."""
    from hanmo.cli import goals

    model, tokenizer, train, validation = base.model, base.tokenizer, splits.train, splits.validation
    if settings.task in HEADS:
        return goals.supervised_goal(settings, model, tokenizer, train, validation)
    if settings.task == "seq2seq":
        return goals.pair_goal(settings, model, tokenizer, base.loaded.generation, train, validation)
    require_decoder(base, settings)
    if settings.task == "instructions":
        return goals.instruction_goal(settings, resolution, model, tokenizer, train, validation)
    if settings.task == "preferences":
        return goals.preference_goal(settings, model, tokenizer, run, train, validation)
    return goals.embedding_goal(settings, model, tokenizer, base.path, train, validation)


def require_decoder(base: Base, settings: FinetuneSettings) -> None:
    """Conversations need a network that writes.

    Raises:
        ModelError: this one does not.
    """
    config = base.model.config
    if settings.task != "embeddings" and not (config.lm and config.causal and config.encoder is None):
        raise ModelError(
            f"--task {settings.task} needs a decoder, and this is a {config.model_type} of another kind",
            where=settings.base,
            fix="choose a decoder such as smollm2-135m-instruct, Llama or Qwen",
            zh=f"--task {settings.task} 需要解码器模型（如 smollm2-135m-instruct），而这是 {config.model_type}",
        )


def with_teacher(
    settings: FinetuneSettings, objective: Objective[Any, Any], student: Transformer, device: torch.device
) -> Objective[Any, Any]:
    """The objective, with a teacher if one was named."""
    if settings.teacher is None:
        return objective
    from hanmo.models.transformer import build
    from hanmo.training.objectives.distillation import Distillation

    _, loaded = load_transformer(settings.teacher, offline=settings.offline)
    teacher = build(loaded.config, loaded.state, checked=loaded.checked).to(device)
    return Distillation(objective, teacher, student, alpha=settings.teacher_share)


def expected(
    base: Base, goal: Goal, horizon: Horizon, settings: FinetuneSettings, trained: int, device: torch.device
) -> Estimate:
    """What the run will take, known before it starts."""
    from hanmo.models.cost import num_parameters
    from hanmo.models.device import available_memory
    from hanmo.training.energy import power_of
    from hanmo.training.estimates import Work, estimate, step_flops_per_token
    from hanmo.training.plan import measure_machine

    assert settings.batch_size is not None and settings.micro_batch is not None
    config = base.model.config
    total = sum(parameter.numel() for parameter in base.model.parameters())
    work = Work(
        config,
        micro_batch=settings.micro_batch * (2 if settings.task == "preferences" else 1),
        length=goal.length,
        trained=trained,
        adapters=total - num_parameters(config),
        average=settings.average > 0,
        checkpointed=settings.activation_checkpointing,
        backward_layers=settings.last_layers,
    )
    speed = measure_machine(device).speed(step_flops_per_token(work), config.hidden_size)
    tokens = goal.tokens / max(1, goal.examples) * settings.batch_size * horizon.expected_steps
    return estimate(
        work,
        tokens=tokens,
        tokens_per_second=speed,
        available=available_memory(device),
        power=power_of(device),
        seconds=horizon.seconds,
    )


def preflight_of(
    base: Base, goal: Goal, settings: FinetuneSettings, objective: Objective[Any, Any], estimate: Estimate
) -> Preflight:
    """The estimates, and for objectives of next tokens one text as the network will see it.

    Raises:
        ModelError, DataError: no network could learn to stop from these texts.
    """
    from hanmo.training.preflight import Preflight, preview

    if settings.task not in ("instructions", "preferences", "seq2seq"):
        return Preflight(estimate)
    stops = set(goal.stop_ids)
    if not stops and base.tokenizer.eos_id is not None:
        stops = {base.tokenizer.eos_id}
    return Preflight(estimate, preview(objective, base.tokenizer, stops))


def recipe_of(settings: FinetuneSettings, base: Base, splits: Splits) -> str:
    """Hash of all that decides the weights: settings, records, tokenizer and base."""
    skipped = NOT_DECISIVE | {
        "paths",
        "validation",
        "fields",
        "base",
        "teacher",
        "config",
        "json",
        "offline",
        "out",
        "overwrite",
    }
    decisive = {item.name: getattr(settings, item.name) for item in fields(settings) if item.name not in skipped}
    identity = [base.fingerprint, base.tokenizer.fingerprint, splits.digest, settings.teacher]
    return hashlib.sha256(json.dumps([decisive, identity], sort_keys=True).encode()).hexdigest()[:16]


def save(
    run: Path, settings: FinetuneSettings, base: Base, goal: Goal, record: dict[str, Any], result: FitResult
) -> Tuned:
    """Write the adapter, if there is one, and the model folder with it folded in."""
    from hanmo.inference.loading import stored_prefix
    from hanmo.models.adapters import merge, save_adapter
    from hanmo.models.checkpoints.save import save_folder

    model = base.model.to("cpu").eval()
    provenance = {
        "kind": "model",
        "settings": record["settings"],
        "base": {"name": settings.base, "fingerprint": base.fingerprint},
        "task": settings.task,
        "metrics": {**result.measures, "steps": result.steps, "tokens": result.tokens},
        "recipe": record["recipe"],
        **versions(),
    }
    adapter = None
    if settings.lora:
        adapter = run / "adapter"
        save_adapter(adapter, model, ADAPTER, base=settings.base, provenance={**provenance, "kind": "adapter"})
        merge(model)
    config = model.config
    if config.lm and config.causal and config.encoder is None:
        provenance["prompt_prefix"] = stored_prefix(base.path, base.loaded)
    generation = dict(base.loaded.generation)
    if goal.stop_ids:
        given = generation.get("eos_token_id")
        before = given if isinstance(given, list) else [given] if given is not None else []
        generation["eos_token_id"] = sorted({*before, *goal.stop_ids})
    target = run / "model"
    save_folder(target, model, base.tokenizer, provenance=provenance, generation=generation)
    if settings.task == "embeddings":
        for name in POOLING_FILES:
            source = base.path / name
            if source.is_dir():
                shutil.copytree(source, target / name, dirs_exist_ok=True)
            elif source.is_file():
                shutil.copy2(source, target / name)
    return Tuned(target, adapter, result)
