"""The dial of fine-tuning: learning rate, batch and passes for a base model and a task, each with its source."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hanmo.language import pick
from hanmo.settings import Resolution, parse_duration
from hanmo.training.optimizer import MUON_TO_ADAMW, OptimizerSettings
from hanmo.training.settings import LoopSettings

REFERENCE_WIDTH = 768  # of BERT-base and GPT-2, for which most published rates hold


@dataclass(frozen=True)
class Usual:
    """What the literature takes for a task.

    Args:
        rate: AdamW's peak rate at width 768, all weights trained.
        batch_size: examples per step.
        epochs: passes over some thousands of examples.
        source: where that is from.
        least_steps: small data are read more often, so that there are about so many steps.
        power: of 768 / width by which narrower networks bear higher rates.
    """

    rate: float
    batch_size: int
    epochs: float
    source: str
    least_steps: int = 30
    power: float = 0.5


LEAST_HEAD_STEPS = 150  # fewer teach a new head nothing (Mosbach et al. 2021)
HEADS = Usual(5e-5, 16, 3, "Devlin et al. 2019, appendix A.3", LEAST_HEAD_STEPS)
USUAL = {
    "classification": HEADS,
    "tagging": HEADS,
    "semantic-roles": HEADS,
    "question-answering": Usual(1e-4, 8, 3, "Turc et al. 2019 (compact models)", LEAST_HEAD_STEPS, power=1.0),
    "seq2seq": Usual(1e-4, 16, 5, "Raffel et al. 2020, appendix; AdamW instead of Adafactor"),
    "new": Usual(0.02, 128, 20, "Jordan et al. 2024: Muon's rate, whatever the width"),
    "instructions": Usual(5e-5, 16, 3, "Taori et al. 2023 (Alpaca), the rate scaled to the width"),
    "preferences": Usual(1e-6, 16, 1, "Rafailov et al. 2023, appendix B"),
    "embeddings": Usual(5e-5, 1, 3, "Reimers and Gurevych 2019"),
    # to go on with pretraining; up to four passes over a text are worth nearly as much as new text
    "text": Usual(1e-4, 16, 3, "Gururangan et al. 2020, appendix; passes: Muennighoff et al. 2023"),
}
LORA_FACTOR = 10.0  # adapters want about ten times the rate of all weights (Schulman et al. 2025, LoRA without regret)
HEAD_FACTOR = 10.0  # a new head starts from nothing; on small data it lags behind otherwise
BETAS = (0.9, 0.999)
WEIGHT_DECAY = 0.01
WARMUP = 0.06  # of the horizon (Liu et al. 2019)
MOST_EPOCHS = 20.0


@dataclass(frozen=True)
class Horizon:
    """How long a fine-tuning lasts; exactly one of ``steps`` and ``seconds`` is given."""

    steps: int | None
    seconds: float | None
    expected_steps: int


def choose_rate(task: str, width: int, *, lora: bool) -> tuple[float, str]:
    """The peak rate and the reason: narrower networks bear higher rates (Yang et al. 2022)."""
    usual = USUAL[task]
    if task == "new":
        return usual.rate, usual.source
    rate = usual.rate * (REFERENCE_WIDTH / width) ** usual.power * (LORA_FACTOR if lora else 1.0)
    root = "sqrt" if usual.power == 0.5 else ""
    reason = f"{usual.source}; {usual.rate:g} x {root}({REFERENCE_WIDTH} / {width})"
    if lora:
        reason += pick(f" x {LORA_FACTOR:g} for adapters", f" x {LORA_FACTOR:g}（适配器）")
    return float(f"{rate:.2g}"), reason


def choose_tuning(
    settings: LoopSettings, resolution: Resolution, *, task: str, width: int, examples: int, lora: bool
) -> Horizon:
    """Settle batch size, rate and horizon.

    Args:
        settings: open fields are filled in.
        width: the hidden size of the base.
        examples: units that a batch counts (records, packed rows, groups) in one pass.
        lora: only adapters are trained.
    """
    usual = USUAL[task]
    batch = max(1, min(usual.batch_size, examples // 4 or 1))
    reason = usual.source if batch == usual.batch_size else pick("there are few examples", "样本较少")
    resolution.compute(settings, "batch_size", batch, reason)
    resolution.compute(settings, "learning_rate", *choose_rate(task, width, lora=lora))
    resolution.compute(settings, "weight_decay", WEIGHT_DECAY, "Devlin et al. 2019, appendix A.2")
    assert settings.batch_size is not None
    per_epoch = max(1, math.ceil(examples / settings.batch_size))
    if settings.budget is not None:
        return Horizon(None, parse_duration(settings.budget), per_epoch)
    if settings.max_steps is not None:
        return Horizon(settings.max_steps, None, settings.max_steps)
    epochs = min(MOST_EPOCHS, max(usual.epochs, usual.least_steps / per_epoch))
    reason = (
        usual.source
        if epochs == usual.epochs
        else pick(
            f"the data are few: about {usual.least_steps} steps",
            f"数据较少：约 {usual.least_steps} 步",
        )
    )
    resolution.compute(settings, "epochs", round(epochs, 1), reason)
    assert settings.epochs is not None
    steps = max(1, round(per_epoch * settings.epochs))
    return Horizon(steps, None, steps)


def tuning_optimizer(settings: LoopSettings, *, new_head: bool, new: bool = False) -> OptimizerSettings:
    """AdamW for all weights; a new head gets a higher rate. A network without weights learns as in pretraining."""
    assert settings.learning_rate is not None and settings.weight_decay is not None
    rate = settings.learning_rate
    if new:
        return OptimizerSettings(rate, MUON_TO_ADAMW * rate, MUON_TO_ADAMW * rate, settings.weight_decay)
    return OptimizerSettings(
        embedding_rate=rate,
        vector_rate=rate,
        weight_decay=settings.weight_decay,
        betas=BETAS,
        muon=False,
        head_rate=rate * HEAD_FACTOR if new_head else None,
        eps=1e-8,
    )
