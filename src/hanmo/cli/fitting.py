"""The training stage of the road: what the dial chooses for an architecture, the fit, and the model folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hanmo.cli.road import RoadSettings, Texts, TrainedRun, versions
from hanmo.settings import Resolution

if TYPE_CHECKING:
    import torch
    from torch import nn

    from hanmo.data.sentences import WordCorpus
    from hanmo.data.tokens import TokenCorpus
    from hanmo.training.fit import FitResult
    from hanmo.training.plan import Machine, Plan


def choose_size(settings: RoadSettings, resolution: Resolution, machine: Machine, vocab_size: int | None) -> str:
    """Settle the size of the network by the dial of its architecture; ``vocab_size`` where it is known already."""
    from hanmo.training import plan, plan_recurrent

    if settings.architecture == "transformer":
        return plan.choose_size(settings, resolution, machine, vocab_size=vocab_size)
    return plan_recurrent.choose_recurrent_size(settings, resolution, machine, vocab_size=vocab_size)


def make_plan(
    settings: RoadSettings, resolution: Resolution, texts: Texts, machine: Machine, device: torch.device
) -> Plan:
    """Settle what is open by the dial of the architecture."""
    from hanmo.training import plan, plan_recurrent

    tokens = texts.tokens
    sizes = {split: len(tokens.tokens(split)) for split in ("train", "validation", "test")}
    if settings.architecture == "transformer":
        return plan.make_plan(
            settings,
            resolution,
            vocab_size=tokens.vocab_size,
            train_tokens=sizes["train"],
            held_out_tokens=min((sizes[split] for split in ("validation", "test") if sizes[split]), default=0),
            machine=machine,
            device=device,
        )
    return plan_recurrent.make_recurrent_plan(
        settings,
        resolution,
        vocab_size=tokens.vocab_size,
        train_tokens=sizes["train"],
        words=texts.corpus is None,
        machine=machine,
        device=device,
    )


def fit(
    run: Path,
    settings: RoadSettings,
    plan: Plan,
    tokens: TokenCorpus | WordCorpus,
    device: torch.device,
    recipe: str,
) -> tuple[nn.Module, FitResult]:
    """Train a new model, or go on with the run's newest checkpoint."""
    from hanmo.models.recurrent import RecurrentConfig, RecurrentModel
    from hanmo.models.transformer import Transformer
    from hanmo.training.fit import FitSettings, Trainer
    from hanmo.training.objectives import CausalLanguageModeling, TruncatedBackpropagation

    assert settings.context is not None
    fit_settings = FitSettings(
        optimizer=plan.optimizer,
        max_steps=plan.steps,
        budget_seconds=plan.seconds,
        max_tokens=plan.max_tokens,
        clip=settings.clip,
        checkpoint_every=settings.checkpoint_every,
        recipe=recipe,
    )
    train, validation = tokens.tokens("train"), tokens.tokens("validation")
    if isinstance(plan.config, RecurrentConfig):
        recurrent = RecurrentModel(plan.config)
        recurrent.initialize(settings.seed)
        streams = TruncatedBackpropagation(
            train,
            validation,
            context=settings.context,
            batch_size=plan.batch_size,
            micro_batch=plan.micro_batch,
            start_id=tokens.eos_id,
            seed=settings.seed,
        )
        return recurrent, Trainer(recurrent, streams, fit_settings, run, device=device, resume=settings.resume).fit()
    model = Transformer(plan.config)
    model.initialize(settings.seed)
    windows = CausalLanguageModeling(
        train,
        validation,
        context=settings.context,
        batch_size=plan.batch_size,
        micro_batch=plan.micro_batch,
        seed=settings.seed,
    )
    return model, Trainer(model, windows, fit_settings, run, device=device, resume=settings.resume).fit()


def provenance_of(texts: Texts, record: dict[str, Any], metrics: dict[str, Any]) -> dict[str, Any]:
    """The entries of the model folder's ``hanmo.json``."""
    tokenizer = texts.tokenizer
    start = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    return {
        "kind": "model",
        "prompt_prefix": [] if start is None else [start],
        "settings": record["settings"],
        "data": texts.record(),
        "metrics": metrics,
        **versions(),
    }


def save_model(trained: TrainedRun, model: nn.Module) -> None:
    """Write the model folder with its provenance."""
    from hanmo.models.checkpoints.recurrent import save_recurrent
    from hanmo.models.checkpoints.save import save_folder
    from hanmo.models.recurrent import RecurrentModel
    from hanmo.models.transformer import Transformer

    result = trained.result
    metrics = {"validation_loss": result.validation_loss, "steps": result.steps, "tokens": result.tokens}
    provenance = provenance_of(trained.texts, trained.record, metrics)
    if isinstance(model, RecurrentModel):
        save_recurrent(trained.model_folder, model, trained.tokenizer, provenance)
    else:
        assert isinstance(model, Transformer)
        save_folder(trained.model_folder, model, trained.tokenizer, provenance=provenance)
