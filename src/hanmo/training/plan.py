"""The dial: from a budget and a corpus to size, vocabulary, context, batch and horizon, each with its reason.

The rule behind the size: a budget of seconds on a machine of a known speed is a number of operations; a model of P
parameters costs about 6 P operations per token; and a model is worth its size only if it sees enough tokens per
parameter. Chinchilla (Hoffmann et al. 2022) found 20 to be optimal when one pass decides; for budgets of minutes, where
the overhead of small matrices counts too, fewer were better here (see ``benchmarks/results/dial.md``).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from hanmo.language import pick
from hanmo.models.architectures import read_config
from hanmo.models.cost import num_parameters, training_flops_per_token
from hanmo.models.device import available_memory
from hanmo.models.kernels import native
from hanmo.models.kernels.products import matmul
from hanmo.models.recurrent import RecurrentConfig
from hanmo.models.transformer import TransformerConfig
from hanmo.progress import display_width, human_bytes, human_count, human_time
from hanmo.settings import Resolution, parse_duration
from hanmo.training.estimates import Work, memory_of
from hanmo.training.optimizer import MUON_TO_ADAMW, OptimizerSettings
from hanmo.training.settings import SIZES, TrainingSettings


@dataclass(frozen=True)
class Rung:
    """One position of the dial.

    Args:
        layers, width, head_dim: of the network; two query heads share one key/value head.
        context: tokens it sees at once.
        vocabulary: entries that suit it: the embedding should not outweigh the blocks.
        batch_tokens: tokens per step that train it well.
    """

    layers: int
    width: int
    head_dim: int
    context: int
    vocabulary: int
    batch_tokens: int


LADDER = dict(
    zip(
        SIZES,
        (
            Rung(4, 128, 32, 256, 1024, 2048),
            Rung(5, 192, 32, 256, 1024, 2048),
            Rung(6, 256, 64, 256, 2048, 4096),
            Rung(6, 384, 64, 256, 4096, 4096),
            Rung(8, 512, 64, 512, 8192, 8192),
            Rung(12, 768, 64, 1024, 16384, 32768),
            Rung(24, 1024, 64, 1024, 32768, 65536),
        ),
        strict=True,
    )
)
TOKENS_PER_PARAMETER = 3.0
MAX_EPOCHS = 10.0  # beyond about ten passes a small model learns its corpus by heart instead of its language
LEAST_STEPS = 200  # fewer, and the warm-up is most of the training
CHINESE_VOCABULARY = 4  # times as many entries: a Chinese text has thousands of characters
GAIN_PER_DOUBLING = 0.15  # bits per byte, for budgets of minutes
CPU_OVERHEAD = 0.0075e-9 * 128  # seconds; width 128 trains at about 85 GFLOP/s on cores of 190 and of 310 GFLOP/s
NATIVE_OVERHEAD = 0.0028e-9 * 128  # with the native kernels: 200 GFLOP/s at width 128, 300 at 384, of 434 in products
DEFAULT_BUDGET = 180.0
MATRIX_RATE = 0.03  # Muon's peak rate at width 128
ADAMW_RATE = 3e-3  # AdamW's
WEIGHT_DECAY = 0.05
MICRO_TOKENS = {"cpu": 4096, "cuda": 16384}  # that pass a network at once: more are not faster, and take more memory
MODERATE = (2.5e9, 2048)  # bytes above which so many tokens must be enough on a CPU: others use the machine, too


def model_config(size: str, vocab_size: int, context: int, objective: str = "causal") -> TransformerConfig:
    """The network at one position of the dial: a decoder in Qwen3's layout, or for masked words an encoder in
    ModernBERT's."""
    rung = LADDER[size]
    heads = rung.width // rung.head_dim
    if objective == "masked":
        return read_config(
            {
                "model_type": "modernbert",
                "architectures": ["ModernBertForMaskedLM"],
                "vocab_size": vocab_size,
                "hidden_size": rung.width,
                "intermediate_size": math.ceil(rung.width * 8 / 3 / 32) * 32,
                "num_hidden_layers": rung.layers,
                "num_attention_heads": heads,
                "max_position_embeddings": context,
            }
        )
    return TransformerConfig(
        vocab_size=vocab_size,
        hidden_size=rung.width,
        num_layers=rung.layers,
        num_heads=heads,
        num_kv_heads=heads // 2,
        head_dim=rung.head_dim,
        intermediate_size=math.ceil(rung.width * 8 / 3 / 32) * 32,
        max_position_embeddings=context,
        tie_embeddings=True,
        qk_norm=True,
        model_type="qwen3",
    )


@dataclass(frozen=True)
class Machine:
    """How fast a device computes.

    Args:
        rate: operations per second of float32 matrix products.
        overhead: seconds that everything which is no product adds per operation and unit of 1/width. Norms, rotations
            and activations cost time in proportion to the width, products to its square.
    """

    rate: float
    overhead: float

    def tokens_per_second(self, config: TransformerConfig, context: int) -> float:
        """Expected training speed."""
        return self.speed(training_flops_per_token(config, context), config.hidden_size)

    def speed(self, flops_per_token: float, width: int) -> float:
        """Tokens per second of a network that needs so many operations for each, with layers of this width."""
        return 1.0 / (flops_per_token * (1.0 / self.rate + self.overhead / width))


def measure_machine(device: torch.device) -> Machine:
    """Measure the matrix rate; the overhead is that of two CPU cores (``benchmarks/results/dial.md``), or a hundredth
    of it on an accelerator, whose memory is about so much faster."""
    fused = native.library() is not None
    overhead = (NATIVE_OVERHEAD if fused else CPU_OVERHEAD) if device.type == "cpu" else CPU_OVERHEAD / 100
    return Machine(measure_matrix_rate(device), overhead)


def measure_matrix_rate(device: torch.device, windows: int = 8, seconds: float = 0.06) -> float:
    """Operations per second of a float32 matrix product here; about 300e9 on two recent cores.

    The best of several short windows: a neighbour's burst of work must not decide the size of a model.
    """
    size = 768 if device.type == "cpu" else 4096
    a = torch.randn(size, size, device=device)
    product = matmul if device.type == "cpu" else torch.mm  # as the layers compute it
    product(a, a).sum().item()
    best = 0.0
    for _ in range(windows):
        count, start = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < seconds:
            product(a, a).sum().item()
            count += 1
        best = max(best, 2.0 * size**3 * count / elapsed)
    return best


@dataclass(frozen=True)
class Plan:
    """What a training run will do and take, known and printed before it starts.

    Args:
        config: the network.
        batch_size, micro_batch: windows per step and per forward pass.
        seconds, steps: the horizon; exactly one is given.
        max_tokens: a budget ends early after so many tokens; ``capped`` where that is expected.
        parameters: of the model.
        flops_per_token: forward and backward.
        tokens_per_second: expected speed.
        tokens: expected to be seen in all.
        expected_seconds: the horizon in time.
        memory: peak bytes of the process.
    """

    config: TransformerConfig | RecurrentConfig
    optimizer: OptimizerSettings
    batch_size: int
    micro_batch: int
    seconds: float | None
    steps: int | None
    max_tokens: float
    capped: bool
    parameters: int
    flops_per_token: float
    tokens_per_second: float
    tokens: float
    expected_seconds: float
    memory: int

    def rows(self) -> dict[str, str]:
        """The network and the estimates, by name, in the user's language."""
        return {
            pick("network", "网络"): describe_network(self.config),
            pick("parameters", "参数量"): human_count(self.parameters),
            pick("operations", "运算量"): f"{human_count(self.flops_per_token * self.tokens)}FLOP "
            + pick(
                f"({human_count(self.flops_per_token)}FLOP per token)",
                f"（每词元 {human_count(self.flops_per_token)}FLOP）",
            ),
            pick("memory", "内存"): human_bytes(self.memory),
            pick("time", "时间"): f"{human_time(self.expected_seconds)} "
            + pick(
                f"for {human_count(self.tokens)} tokens at {self.tokens_per_second:,.0f} tok/s",
                f"（{human_count(self.tokens)} 词元，{self.tokens_per_second:,.0f} 词元/秒）",
            ),
        }

    def warning(self, train_tokens: int) -> str:
        """That the run will end before its time is over; empty where it will not."""
        if not self.capped:
            return ""
        passes, text = self.max_tokens / train_tokens, human_count(train_tokens)
        return pick(
            f"the training will end early: {passes:g} passes over {text} tokens are enough, more would learn them by "
            "heart (--max-steps overrides this)",
            f"训练会提前结束：{text} 词元读 {passes:g} 遍已足够，再多只会死记硬背（可用 --max-steps 改变）",
        )

    def describe(self, *, colour: bool = False) -> str:
        """The estimates for people, without colour in any case."""
        del colour
        head = pick("expected, before the start:", "开始之前的估计：")
        lines = [f"  {name}{' ' * (13 - display_width(name))}{value}" for name, value in self.rows().items()]
        return "\n".join([head, *lines])


def describe_network(c: TransformerConfig | RecurrentConfig) -> str:
    """The network in a line, in the user's language."""
    if isinstance(c, RecurrentConfig):
        return pick(
            f"{c.cell.upper()}, {c.num_layers} layers of {c.hidden_size}, vocabulary {c.vocab_size:,}, "
            f"dropout {c.dropout:g}",
            f"{c.cell.upper()}，{c.num_layers} 层，宽度 {c.hidden_size}，词表 {c.vocab_size:,}，dropout {c.dropout:g}",
        )
    return pick(
        f"{c.num_layers} layers, width {c.hidden_size}, {c.num_heads} heads ({c.num_kv_heads} for keys and "
        f"values), vocabulary {c.vocab_size:,}, context {c.max_position_embeddings}",
        f"{c.num_layers} 层，宽度 {c.hidden_size}，{c.num_heads} 头（键值 {c.num_kv_heads} 头），"
        f"词表 {c.vocab_size:,}，上下文 {c.max_position_embeddings}",
    )


def choose_size(
    settings: TrainingSettings, resolution: Resolution, machine: Machine, *, vocab_size: int | None = None
) -> str:
    """Settle ``settings.size``: the largest model that sees enough tokens per parameter within the budget.

    Without ``vocab_size`` the vocabulary is chosen after the size: each size is judged with the one that suits it.
    """
    seconds = horizon_seconds(settings)
    best, ratio = SIZES[0], 0.0
    for size in SIZES:
        config = model_config(size, vocab_size or LADDER[size].vocabulary, LADDER[size].context, settings.objective)
        if settings.budget is None and (settings.max_steps is not None or settings.epochs is not None):
            break  # a number of steps says nothing about time: the smallest model is the safe choice
        seen = machine.tokens_per_second(config, LADDER[size].context) * seconds / num_parameters(config)
        if seen >= TOKENS_PER_PARAMETER or size == SIZES[0]:
            best, ratio = size, seen
    reason = pick(
        f"the largest that sees {TOKENS_PER_PARAMETER:g} tokens per parameter in {human_time(seconds)}",
        f"在 {human_time(seconds)} 内每个参数能读到 {TOKENS_PER_PARAMETER:g} 个词元的最大模型",
    )
    if ratio < TOKENS_PER_PARAMETER:
        reason = pick("the smallest; name another with --size", "最小的模型；可用 --size 另选")
    resolution.compute(settings, "size", best, reason)
    assert settings.size is not None
    return settings.size


def choose_vocabulary(size: str, *, chinese_share: float) -> tuple[int, str]:
    """How many entries the tokenizer should have, and the reason (``benchmarks/results/dial.md``).

    Args:
        chinese_share: share of Chinese text, which has thousands of characters.
    """
    vocabulary = LADDER[size].vocabulary
    if chinese_share > 0.3:
        return vocabulary * CHINESE_VOCABULARY, pick(
            f"suits the size; {chinese_share:.0%} of the text is Chinese",
            f"与模型大小相称；{chinese_share:.0%} 的文本为中文",
        )
    return vocabulary, pick(
        "suits the size: the embedding should not outweigh the blocks", "与模型大小相称：词嵌入不应大过其余部分"
    )


def horizon_seconds(settings: TrainingSettings) -> float:
    """The budget in seconds; the default where none is given."""
    return parse_duration(settings.budget) if settings.budget else DEFAULT_BUDGET


def enough_seconds(seconds: float, gap: float) -> float:
    """About how long a training should have been to be better by ``gap`` bits per byte.

    Each doubling of a short budget gained about the same (``benchmarks/results/dial.md``); a rule of thumb, not a law.
    """
    return seconds * math.pow(2.0, gap / GAIN_PER_DOUBLING)


def make_plan(
    settings: TrainingSettings,
    resolution: Resolution,
    *,
    vocab_size: int,
    train_tokens: int,
    held_out_tokens: int,
    machine: Machine,
    device: torch.device,
) -> Plan:
    """Settle everything that is left open, record the reasons, and estimate what the run will take.

    Args:
        settings: its size must be settled; open fields are filled in.
        held_out_tokens: size of the smallest split that must hold a window.
        machine: how fast it computes.
        device: whose memory the micro-batch must fit.
    """
    assert settings.size is not None
    rung = LADDER[settings.size]
    room = min(train_tokens // 4, held_out_tokens - 1)
    context = max(8, min(rung.context, room))
    reason = (
        pick("suits the size", "与模型大小相称") if context == rung.context else pick("the text is short", "文本较短")
    )
    resolution.compute(settings, "context", context, reason)
    assert settings.context is not None
    config = model_config(settings.size, vocab_size, settings.context, settings.objective)
    speed = machine.tokens_per_second(config, settings.context)
    expected = expected_tokens(settings, speed, train_tokens, MAX_EPOCHS)
    resolution.compute(settings, "batch_size", *choose_batch(settings, rung, expected))
    assert settings.batch_size is not None
    resolution.compute(settings, "micro_batch", *choose_micro_batch(settings, config, device))
    resolution.compute(settings, "learning_rate", *learning_rate(settings))
    assert settings.micro_batch is not None
    settle_decay(settings, resolution)
    horizon = make_horizon(settings, resolution, speed, train_tokens, MAX_EPOCHS)
    return Plan(
        config=config,
        optimizer=optimizer_settings(settings),
        batch_size=settings.batch_size,
        micro_batch=settings.micro_batch,
        seconds=horizon.seconds,
        steps=horizon.steps,
        max_tokens=horizon.max_tokens,
        capped=horizon.capped,
        parameters=num_parameters(config),
        flops_per_token=training_flops_per_token(config, settings.context),
        tokens_per_second=speed,
        tokens=horizon.tokens,
        expected_seconds=horizon.tokens / speed,
        memory=memory_of(work_of(settings, config, settings.micro_batch, device)).total,
    )


@dataclass(frozen=True)
class Horizon:
    """Where a training ends: after ``seconds`` or ``steps``; ``tokens`` are those expected, see :class:`Plan`."""

    seconds: float | None
    steps: int | None
    tokens: float
    max_tokens: float
    capped: bool


def expected_tokens(settings: TrainingSettings, speed: float, train_tokens: int, max_epochs: float) -> float:
    """Tokens that a training by time or by passes will see."""
    if settings.epochs is not None:
        return settings.epochs * train_tokens
    return min(speed * horizon_seconds(settings), max_epochs * train_tokens)


def make_horizon(
    settings: TrainingSettings, resolution: Resolution, speed: float, train_tokens: int, max_epochs: float
) -> Horizon:
    """Settle how long to train; batch and context must be settled.

    Args:
        speed: expected tokens per second.
        max_epochs: passes over the text at which a budget of time ends early.
    """
    assert settings.batch_size is not None and settings.context is not None
    per_step = settings.batch_size * settings.context
    max_tokens = max_epochs * train_tokens
    if settings.max_steps is not None or settings.epochs is not None:
        steps = settings.max_steps or max(1, int((settings.epochs or 0) * ((train_tokens - 1) // per_step)))
        return Horizon(None, steps, float(steps * per_step), max_tokens, capped=False)
    tokens = expected_tokens(settings, speed, train_tokens, max_epochs)
    seconds = horizon_seconds(settings)
    resolution.compute(settings, "budget", f"{seconds:g}s", pick("the default", "默认值"))
    return Horizon(seconds, None, tokens, max_tokens, capped=tokens == max_tokens)


def choose_batch(settings: TrainingSettings, rung: Rung, tokens: float) -> tuple[int, str]:
    """Windows per step: what suits the size, or less where the text would otherwise give only a few steps."""
    assert settings.context is not None
    usual = max(1, rung.batch_tokens // settings.context)
    if settings.max_steps is None and tokens < LEAST_STEPS * usual * settings.context:
        fewer = max(1, int(tokens / (LEAST_STEPS * settings.context)))
        return fewer, pick(f"small, so that there are about {LEAST_STEPS} steps", f"较小，以便有约 {LEAST_STEPS} 步")
    return usual, pick(
        f"about {rung.batch_tokens} tokens per step suit this size", f"每步约 {rung.batch_tokens} 个词元适合此大小"
    )


def work_of(settings: TrainingSettings, config: TransformerConfig, micro_batch: int, device: torch.device) -> Work:
    """What a step computes with micro-batches of this size; batch and context must be settled."""
    assert settings.batch_size is not None and settings.context is not None
    return Work(
        config,
        micro_batch,
        settings.context,
        muon=settings.optimizer == "muon",
        average=settings.average > 0,
        checkpointed=settings.activation_checkpointing,
        accumulated=micro_batch < settings.batch_size,
        device=device.type,
    )


def choose_micro_batch(settings: TrainingSettings, config: TransformerConfig, device: torch.device) -> tuple[int, str]:
    """As many windows at a time as keep the processor busy, if they fit into half of the free memory; and the reason.

    Batch and context must be settled.
    """
    assert settings.batch_size is not None and settings.context is not None

    def needed(micro: int) -> int:
        return memory_of(work_of(settings, config, micro, device)).total

    def too_many(micro: int) -> bool:
        size, enough = MODERATE
        return device.type == "cpu" and micro * (settings.context or 0) > enough and needed(micro) > size

    limit = available_memory(device) // 2
    most = MICRO_TOKENS.get(device.type, MICRO_TOKENS["cuda"])
    micro = min(settings.batch_size, max(1, most // settings.context))
    while micro > 1 and (needed(micro) > limit or too_many(micro)):
        micro //= 2
    size = human_bytes(needed(micro))
    return micro, pick(f"needs {size} of memory", f"需要 {size} 内存")


def learning_rate(settings: TrainingSettings) -> tuple[float, str]:
    """The optimizer's peak rate; wider matrices take slightly smaller steps."""
    assert settings.size is not None
    wider = LADDER[SIZES[0]].width / LADDER[settings.size].width
    if settings.optimizer == "adamw":
        return float(f"{ADAMW_RATE * wider**0.5:.2g}"), pick(
            "AdamW's rate for this width (Yang et al. 2022)", "此宽度下 AdamW 的学习率（Yang 等 2022）"
        )
    return float(round(MATRIX_RATE * wider**0.25, 4)), pick(
        "Muon's rate for this width (benchmarks/results/dial.md)",
        "此宽度下 Muon 的学习率（见 benchmarks/results/dial.md）",
    )


def settle_decay(settings: TrainingSettings, resolution: Resolution) -> None:
    """Settle the weight decay."""
    reason = pick("a little: few passes over a text hardly overfit", "较小：读几遍文本几乎不会过拟合")
    resolution.compute(settings, "weight_decay", WEIGHT_DECAY, reason)


def optimizer_settings(settings: TrainingSettings) -> OptimizerSettings:
    """All rates follow the one that is a setting."""
    assert settings.learning_rate is not None and settings.weight_decay is not None
    rate = settings.learning_rate
    if settings.optimizer == "adamw":
        return OptimizerSettings(rate, rate, rate, settings.weight_decay, muon=False)
    return OptimizerSettings(rate, MUON_TO_ADAMW * rate, MUON_TO_ADAMW * rate, settings.weight_decay)
