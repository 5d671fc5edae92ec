"""The stages of a fine-tuning: records, base model, objective, training, and the folders that it leaves."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hanmo.cli.bases import ADAPTER, Base, choose_weights, load_base, load_transformer, require_decoder
from hanmo.cli.contexts import Fits
from hanmo.cli.finetune import NEW, FinetuneSettings
from hanmo.cli.fitting import loop_settings, use_precision
from hanmo.cli.fresh import settle_new
from hanmo.cli.goals import HEADS, Goal, settle_micro_batch
from hanmo.cli.road import NOT_DECISIVE, clear_run, refuse_other_recipe, restore_choices, versions
from hanmo.cli.scores import find_scores
from hanmo.cli.searching import search_tuning
from hanmo.cli.splits import Splits, read_splits
from hanmo.cli.together import prepare_model
from hanmo.folder import write_json
from hanmo.language import pick
from hanmo.settings import Resolution, notice

if TYPE_CHECKING:
    import torch

    from hanmo.evaluation.task_baselines import Score
    from hanmo.models.transformer import Transformer
    from hanmo.training.estimates import Estimate, Work
    from hanmo.training.fit import FitResult, FitSettings
    from hanmo.training.objectives import Objective
    from hanmo.training.plan_tuning import Horizon
    from hanmo.training.preflight import Preflight
    from hanmo.training.processes import Processes
    from hanmo.training.trackers import Tracker

RANK = 16  # of adapters
POOLING_FILES = ("modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "1_Pooling")


@dataclass
class Tuned:
    """What a fine-tuning leaves."""

    model_folder: Path
    adapter_folder: Path | None
    result: FitResult
    scores: list[Score]  # what the result is compared with


def tune(run: Path, settings: FinetuneSettings, processes: Processes, device: torch.device) -> Tuned:
    """Fine-tune in the folder that this process holds; ends with the model folder at ``<run>/model``.

    Raises:
        HanmoError: whatever goes wrong on the way. Until the training starts, an earlier run in the folder is intact.
    """
    from hanmo.evaluation.task_baselines import describe_scores
    from hanmo.evaluation.training_report import TrainingReport
    from hanmo.models.device import available_memory
    from hanmo.training.acceleration import even_micro_batch
    from hanmo.training.fit import FINAL_TOKENS, Trainer
    from hanmo.training.launch import launch_id
    from hanmo.training.preflight import wants_colour
    from hanmo.training.search_record import FILE, SearchRecord
    from hanmo.training.trackers import open_trackers

    resolution = Resolution()
    memory = int(processes.decide(available_memory(device)))  # all must choose the same

    def read() -> tuple[Splits, Base, int, Goal]:
        restore_choices(run, settings, resolution)
        splits = read_splits(run, settings, follower=not processes.main)
        settle_new(settings, resolution, len(splits.train))
        base = load_base(settings, splits)
        if settings.lora:
            resolution.compute(settings, "rank", RANK, pick("enough for some thousand records", "足以应对数千条记录"))
        trained = choose_weights(base, settings)

        def fits(length: int) -> bool:
            from hanmo.training.estimates import fits, memory_of

            return fits(memory_of(work_of(base, settings, trained, length, 1, device)).total, memory)

        return splits, base, trained, make_goal(run, settings, resolution, base, splits, fits)

    splits, base, trained, goal = processes.first_main(read)  # a mistake in the records is told once
    horizon = settle_horizon(settings, resolution, base, goal)
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
    if settings.search is not None:
        record = search_tuning(run, settings, record, base, goal, device, lambda: recipe_of(settings, base, splits))
        horizon = settle_horizon(settings, resolution, base, goal)
        trained = sum(p.numel() for p in base.model.parameters() if p.requires_grad)
        estimate = expected(base, goal, horizon, settings, trained, device)
    use_precision(base.model, settings.precision, device)
    prepare_model(base.model, settings, device, estimate.seconds)
    base.model.to(device)
    objective = processes.first_main(goal.build)  # the others find what the first computed, such as a reference
    preflight = preflight_of(base, goal, settings, objective, estimate)
    notice(preflight.describe(colour=wants_colour(sys.stderr)))
    objective = with_teacher(settings, objective, base.model, device)
    loop = loop_of(settings, base, horizon, record["recipe"], tokens_of(goal, settings, horizon))
    report = TrainingReport(
        run,
        plan={"": estimate.describe()},
        settings=record["settings"],
        computed=record["computed"],
        versions=versions(),
        search=SearchRecord.read(run / FILE),
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
        scores = find_scores(run, settings, splits, processes, lambda: trainer.validate(FINAL_TOKENS))
        if scores:
            report.plan = {**report.plan, pick("to beat", "对照"): describe_scores(scores)}
        result = trainer.fit()
    finally:
        for tracker in trackers:
            tracker.close()
    return processes.on_main(lambda: save(run, settings, base, goal, record, result, scores)) or Tuned(
        run / "model", None, result, scores
    )


def settle_horizon(settings: FinetuneSettings, resolution: Resolution, base: Base, goal: Goal) -> Horizon:
    """How long to train; batch, rate and passes are settled where they are open."""
    from hanmo.training.plan_tuning import choose_tuning

    return choose_tuning(
        settings,
        resolution,
        task=settings.base if settings.base == NEW else settings.task,
        width=base.model.config.hidden_size,
        examples=max(1, goal.examples),
        lora=settings.lora,
    )


def loop_of(
    settings: FinetuneSettings, base: Base, horizon: Horizon, recipe: str, tokens: float = math.inf
) -> FitSettings:
    """What the loop needs: a short warm-up, then a rate that falls to nothing.

    Args:
        tokens: of the whole run, of which the evaluations on the way are a small part.
    """
    from hanmo.training.plan_tuning import WARMUP, tuning_optimizer

    return loop_settings(
        settings,
        tuning_optimizer(settings, new_head=base.new_head, new=settings.base == NEW),
        recipe,
        horizon.steps,
        horizon.seconds,
        expected_tokens=tokens,
        warmup_steps=1,
        warmup=WARMUP,
        cooldown=1.0,
        final=0.0,
    )


def make_goal(
    run: Path, settings: FinetuneSettings, resolution: Resolution, base: Base, splits: Splits, fits: Fits
) -> Goal:
    """The records as examples of the task's objective."""
    from hanmo.cli import goals

    model, tokenizer, train, validation = base.model, base.tokenizer, splits.train, splits.validation
    if settings.task in HEADS:
        return goals.supervised_goal(settings, resolution, model, tokenizer, train, validation, fits)
    if settings.task == "seq2seq":
        return goals.pair_goal(settings, resolution, model, tokenizer, base.loaded.generation, train, validation, fits)
    require_decoder(base, settings)
    if settings.task == "text":
        assert splits.corpus is not None
        return goals.text_goal(settings, resolution, model, tokenizer, splits.corpus, fits)
    if settings.task == "instructions":
        return goals.instruction_goal(settings, resolution, model, tokenizer, train, validation, fits)
    if settings.task == "preferences":
        return goals.preference_goal(settings, resolution, model, tokenizer, run, train, validation, fits)
    return goals.embedding_goal(settings, resolution, model, tokenizer, base.path, train, validation, fits)


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


def work_of(
    base: Base, settings: FinetuneSettings, trained: int, length: int, micro_batch: int, device: torch.device
) -> Work:
    """What a step computes with rows of so many tokens."""
    from hanmo.models.cost import num_parameters
    from hanmo.training.estimates import Work

    total = sum(parameter.numel() for parameter in base.model.parameters())
    return Work(
        base.model.config,
        micro_batch=micro_batch,
        rows_each=2 if settings.task == "preferences" else 1,
        length=length,
        trained=trained,
        adapters=total - num_parameters(base.model.config),
        average=settings.average > 0,
        checkpointed=settings.activation_checkpointing,
        backward_layers=settings.last_layers,
        accumulated=settings.batch_size is None or micro_batch < settings.batch_size,
        device=device.type,
    )


def tokens_of(goal: Goal, settings: FinetuneSettings, horizon: Horizon) -> float:
    """Tokens that the whole run reads."""
    assert settings.batch_size is not None
    return goal.tokens / max(1, goal.examples) * settings.batch_size * horizon.expected_steps


def expected(
    base: Base, goal: Goal, horizon: Horizon, settings: FinetuneSettings, trained: int, device: torch.device
) -> Estimate:
    """What the run will take, known before it starts."""
    from hanmo.models.device import available_memory
    from hanmo.training.energy import power_of
    from hanmo.training.estimates import estimate, step_flops_per_token
    from hanmo.training.plan import measure_machine

    assert settings.micro_batch is not None
    work = work_of(base, settings, trained, goal.length, settings.micro_batch, device)
    return estimate(
        work,
        tokens=tokens_of(goal, settings, horizon),
        tokens_per_second=measure_machine(device).speed(step_flops_per_token(work), base.model.config.hidden_size),
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

    if settings.task not in ("instructions", "preferences", "seq2seq", "text"):
        return Preflight(estimate)
    stops = set(goal.stop_ids)
    if not stops and base.tokenizer.eos_id is not None:
        stops = {base.tokenizer.eos_id}
    return Preflight(estimate, preview(objective, base.tokenizer, stops, must_stop=settings.task != "text"))


def recipe_of(settings: FinetuneSettings, base: Base, splits: Splits) -> str:
    """Hash of all that decides the weights: settings, records, tokenizer and base."""
    skipped = NOT_DECISIVE | {
        "paths",
        "validation",
        "fields",
        "baseline",
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
    run: Path,
    settings: FinetuneSettings,
    base: Base,
    goal: Goal,
    record: dict[str, Any],
    result: FitResult,
    scores: list[Score],
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
        "baselines": [score.as_dict() for score in scores],
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
    if settings.both_ways:
        from hanmo.cli.fresh import PREFIXES

        provenance["target_prefixes"] = PREFIXES
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
    return Tuned(target, adapter, result, scores)
