"""The dial of recurrent networks: size, streams, dropout and horizon, each with its reason.

The sizes are those of Zaremba et al. (2014) and steps between them: ``micro`` is their small network, ``medium`` and
``large`` bear their names. Word-level corpora train for a number of passes, as all published results do; other texts
for a time, as transformers do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hanmo.language import pick
from hanmo.models.cost import VALUE
from hanmo.models.device import available_memory
from hanmo.models.kernels.loss import CHUNK_LOGITS, FEWEST_ROWS
from hanmo.models.recurrent import (
    RecurrentConfig,
    activation_bytes,
    num_parameters,
    training_flops_per_token,
)
from hanmo.progress import human_bytes, human_time
from hanmo.settings import Resolution
from hanmo.training.estimates import GAPS, PROCESS_BYTES
from hanmo.training.optimizer import OptimizerSettings
from hanmo.training.plan import (
    LADDER,
    TOKENS_PER_PARAMETER,
    Machine,
    Plan,
    expected_tokens,
    horizon_seconds,
    make_horizon,
    settle_decay,
)
from hanmo.training.settings import SIZES, TrainingSettings


@dataclass(frozen=True)
class RecurrentRung:
    """One position of the dial: ``layers`` of ``width`` units."""

    layers: int
    width: int


RECURRENT_LADDER = dict(
    zip(
        SIZES,
        (
            RecurrentRung(1, 128),
            RecurrentRung(2, 200),
            RecurrentRung(2, 320),
            RecurrentRung(2, 480),
            RecurrentRung(2, 650),
            RecurrentRung(2, 1024),
            RecurrentRung(2, 1500),
        ),
        strict=True,
    )
)
WORD_SIZE = "micro"
WORD_EPOCHS = 6.0
MAX_EPOCHS = 40.0  # dropout lets a network profit from more passes than the ten of a transformer without it
STREAMS = 20
CONTEXT = 35  # steps of truncated back-propagation (Zaremba et al. 2014); words depend on little before that
TOKEN_CONTEXT = 64  # pieces and characters are shorter than words
LEAST_STEPS_PER_EPOCH = 20
MATRIX_RATE = 0.02
EMBEDDING_RATE = 0.3  # times the matrix rate
# Most words are rare: with 0.95 the validation loss after 600 steps was 5.34, with 0.99 it was 5.20 (small LSTM).
BETAS = (0.9, 0.99)


def recurrent_config(cell: str, size: str, vocab_size: int, dropout: float = 0.0) -> RecurrentConfig:
    """The network at one position of the dial; embeddings are as wide as the layers, and tied."""
    rung = RECURRENT_LADDER[size]
    return RecurrentConfig(
        cell=cell,
        vocab_size=vocab_size,
        embedding_size=rung.width,
        hidden_size=rung.width,
        num_layers=rung.layers,
        dropout=dropout,
        output_dropout=dropout,
        embedding_dropout=round(dropout / 4, 4),
    )


def memory_of(config: RecurrentConfig, rows: int, length: int) -> int:
    """Bytes at the moment of a run that needs most: the process, weights with gradients and two moments, what the
    forward pass keeps (and once more what two layers do, for room that stays free between blocks of the heap), and the
    loss: a chunk of logits, hidden states with their gradients, and the gradient of the output layer in parts."""
    kept, output = activation_bytes(config, rows, length), config.vocab_size * config.embedding_size
    chunk = min(rows * length, max(FEWEST_ROWS, CHUNK_LOGITS["cpu"] // config.vocab_size))
    loss = chunk * config.vocab_size + 2 * rows * length * config.output_size + 2 * output
    gaps = GAPS * kept // config.num_layers
    return PROCESS_BYTES + VALUE * (4 * num_parameters(config) + loss) + kept + gaps


def speed_of(config: RecurrentConfig, machine: Machine) -> float:
    """Expected training tokens per second."""
    return machine.speed(training_flops_per_token(config), config.hidden_size)


def choose_recurrent_size(
    settings: TrainingSettings, resolution: Resolution, machine: Machine, *, vocab_size: int | None
) -> str:
    """Settle ``settings.size`` and, for a word-level corpus without a horizon, ``settings.epochs``.

    With a time, the largest network that sees enough tokens per parameter in it; else the small one of the literature
    for words, and the smallest for other texts.

    Args:
        vocab_size: of a word-level corpus; None for other texts, whose vocabulary is chosen after the size.
    """
    untimed = settings.budget is None and (settings.max_steps is not None or settings.epochs is not None)
    if vocab_size is not None and settings.budget is None:
        if not untimed:
            reason = pick(
                "passes over a corpus of words; --budget gives a time instead", "读词语料的遍数；也可用 --budget 限时"
            )
            resolution.compute(settings, "epochs", WORD_EPOCHS, reason)
        reason = pick("the small network of Zaremba et al. (2014)", "即 Zaremba 等（2014）的小型网络")
        resolution.compute(settings, "size", WORD_SIZE, reason)
    best, seconds = SIZES[0], horizon_seconds(settings)
    for size in SIZES if not untimed else ():
        config = recurrent_config(settings.architecture, size, vocab_size or LADDER[size].vocabulary)
        if speed_of(config, machine) * seconds / num_parameters(config) >= TOKENS_PER_PARAMETER:
            best = size
    reason = pick(
        f"the largest that sees {TOKENS_PER_PARAMETER:g} tokens per parameter in {human_time(seconds)}",
        f"在 {human_time(seconds)} 内每个参数能读到 {TOKENS_PER_PARAMETER:g} 个词元的最大模型",
    )
    if best == SIZES[0]:
        reason = pick("the smallest; name another with --size", "最小的模型；可用 --size 另选")
    resolution.compute(settings, "size", best, reason)
    assert settings.size is not None
    return settings.size


def choose_dropout(passes: float) -> float:
    """More passes over the same text need more noise, lest they learn it by heart."""
    if passes < 2:
        return 0.0
    return 0.1 if passes < 12 else 0.2


def make_recurrent_plan(
    settings: TrainingSettings,
    resolution: Resolution,
    *,
    vocab_size: int,
    train_tokens: int,
    words: bool,
    machine: Machine,
    device: torch.device,
) -> Plan:
    """Settle everything that is left open, record the reasons, and estimate what the run will take.

    Args:
        settings: its size must be settled; open fields are filled in.
        words: a word-level corpus.
        machine: how fast it computes.
        device: whose memory the micro-batch must fit.
    """
    assert settings.size is not None
    reason = pick("steps that the gradient runs back", "梯度回传的步数")
    resolution.compute(settings, "context", CONTEXT if words else TOKEN_CONTEXT, reason)
    assert settings.context is not None
    streams = max(1, min(STREAMS, train_tokens // (LEAST_STEPS_PER_EPOCH * settings.context)))
    reason = (
        pick("streams read side by side", "并行读取的文本流数")
        if streams == STREAMS
        else pick("the text is short", "文本较短")
    )
    resolution.compute(settings, "batch_size", streams, reason)
    assert settings.batch_size is not None
    speed = speed_of(recurrent_config(settings.architecture, settings.size, vocab_size), machine)
    if settings.max_steps is not None:
        passes = settings.max_steps * settings.batch_size * settings.context / max(1, train_tokens)
    else:
        passes = expected_tokens(settings, speed, train_tokens, MAX_EPOCHS) / max(1, train_tokens)
    reason = pick(f"suits {passes:.1f} passes over the text", f"适合把文本读 {passes:.1f} 遍")
    resolution.compute(settings, "dropout", choose_dropout(passes), reason)
    assert settings.dropout is not None
    config = recurrent_config(settings.architecture, settings.size, vocab_size, settings.dropout)
    micro = settings.batch_size
    while micro > 1 and memory_of(config, micro, settings.context) > available_memory(device) // 2:
        micro //= 2
    needed = human_bytes(memory_of(config, micro, settings.context))
    resolution.compute(settings, "micro_batch", micro, pick(f"needs {needed} of memory", f"需要 {needed} 内存"))
    resolution.compute(settings, "learning_rate", MATRIX_RATE, pick("Muon's rate", "Muon 的学习率"))
    settle_decay(settings, resolution)
    assert settings.micro_batch is not None and settings.learning_rate is not None and settings.weight_decay is not None
    horizon = make_horizon(settings, resolution, speed, train_tokens, MAX_EPOCHS)
    rate = settings.learning_rate
    return Plan(
        config=config,
        optimizer=OptimizerSettings(
            rate, EMBEDDING_RATE * rate, EMBEDDING_RATE * rate, settings.weight_decay, betas=BETAS
        ),
        batch_size=settings.batch_size,
        micro_batch=settings.micro_batch,
        seconds=horizon.seconds,
        steps=horizon.steps,
        max_tokens=horizon.max_tokens,
        capped=horizon.capped,
        parameters=num_parameters(config),
        flops_per_token=training_flops_per_token(config),
        tokens_per_second=speed,
        tokens=horizon.tokens,
        expected_seconds=horizon.tokens / speed,
        memory=memory_of(config, settings.micro_batch, settings.context),
    )
