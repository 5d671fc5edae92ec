"""What a run will take, known before it starts: memory, time and energy, and what to change where it will not fit.

Everything is computed from numbers: the network's configuration, what is trained, and the machine's measured speed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from hanmo.errors import ResourceError
from hanmo.language import pick
from hanmo.models.cost import (
    VALUE,
    activation_bytes,
    block_values,
    forward_flops_per_token,
    matrix_parameters,
    num_parameters,
)
from hanmo.models.kernels import native
from hanmo.models.kernels.loss import CHUNK_LOGITS, FEWEST_ROWS
from hanmo.models.transformer import TransformerConfig
from hanmo.progress import display_width, human_bytes, human_count, human_time
from hanmo.training.energy import Power
from hanmo.training.optimizer import UPDATE_NUMBERS

PROCESS_BYTES = 360_000_000  # Python, torch, its libraries and what they set aside
# Room between blocks in use that the next one does not fit into grows with the largest tensors, not with their number:
# measured, it is what so many of a network's blocks keep (benchmarks/results/memory.txt). There is more where gradients
# lie between the activations of the next micro-batch, where blocks are computed again, and without native kernels.
GAPS, GAPS_BY_TORCH, GAPS_BY_GRADIENTS, GAPS_BY_RECOMPUTING = 2, 2, 4, 1
CERTAINTY = 1.15  # the estimate is this near to the truth
LORA_RANK = 16
LEAST_CONTEXT = 64


@dataclass(frozen=True)
class Work:
    """What a step computes.

    Args:
        config: the network, adapters left out.
        micro_batch: examples at a time.
        length: tokens of a row; of an encoder-decoder, those of source and answer together.
        trained: parameters that are trained; None: all.
        adapters: of these, how many are no part of the network itself.
        muon: matrices are trained with Muon, which keeps one number for each; AdamW keeps two.
        average: a moving average of the trained weights is kept.
        checkpointed: activations are computed again in the backward pass.
        backward_layers: blocks nearest to the output that gradients reach; None: all.
        accumulated: a step has several micro-batches.
        rows_each: rows of an example; two of a pair of answers.
        device: the kind of device; a CPU's memory holds the process, too.
    """

    config: TransformerConfig
    micro_batch: int
    length: int
    trained: int | None = None
    adapters: int = 0
    muon: bool = False
    average: bool = False
    checkpointed: bool = False
    backward_layers: int | None = None
    accumulated: bool = True
    rows_each: int = 1
    device: str = "cpu"

    @property
    def rows(self) -> int:
        """Rows that pass the network at once."""
        return self.micro_batch * self.rows_each

    @property
    def parameters(self) -> int:
        """All parameters, adapters included."""
        return num_parameters(self.config) + self.adapters

    @property
    def learned(self) -> int:
        """Parameters that are trained."""
        return self.parameters if self.trained is None else self.trained

    @property
    def whole(self) -> bool:
        """Whether all parameters are trained, the embeddings among them."""
        return self.learned >= self.parameters


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the moment of a run that needs most, by what they hold."""

    process: int
    trained_weights: int
    frozen_weights: int
    moments: int
    average: int
    best: int
    gradients: int
    activations: int
    logits: int
    buffers: int

    @property
    def total(self) -> int:
        """All of it: what the system shows as the resident memory of the process (on an accelerator, of the device)."""
        return sum(asdict(self).values())

    def rows(self) -> dict[str, str]:
        """The parts that are not zero, by name, in the user's language."""
        names = {
            "process": pick("process", "进程"),
            "trained_weights": pick("weights, trained", "权重（训练）"),
            "frozen_weights": pick("weights, frozen", "权重（冻结）"),
            "moments": pick("optimizer", "优化器状态"),
            "average": pick("average of weights", "权重平均"),
            "best": pick("best weights", "最佳权重"),
            "gradients": pick("gradients", "梯度"),
            "activations": pick("activations", "激活值"),
            "logits": pick("logits", "词表得分"),
            "buffers": pick("buffers", "缓冲"),
        }
        return {names[name]: human_bytes(size) for name, size in asdict(self).items() if size}


def native_kernels(work: Work) -> bool:
    """Whether the native kernels compute the work."""
    return work.device == "cpu" and native.library() is not None


def activations_of(work: Work) -> tuple[int, int]:
    """Bytes that a micro-batch keeps for the backward pass, and of these what one block keeps while it is computed."""
    fused, source = native_kernels(work), work.length // 2 if work.config.encoder else 0
    length = work.length - source
    how: dict[str, Any] = {"layers": work.backward_layers, "recomputed": work.checkpointed, "fused": fused}
    block = VALUE * work.rows * length * block_values(work.config, length, source, fused=fused)
    return activation_bytes(work.config, work.rows, length, source, **how), round(block)


def memory_of(work: Work) -> MemoryEstimate:
    """The memory of a run at the moment that needs most.

    Weights, moments and average are always there. What comes and goes is largest at one of two moments: when the loss
    of a micro-batch is computed, with all of its activations, or when the weights are updated, with all gradients. The
    heap keeps that room, so the best weights, which are read from their file at the end, come on top of it.
    """
    config, trained, tokens = work.config, work.learned, work.rows * work.length
    D, V = config.hidden_size, config.vocab_size
    matrices = min(trained, matrix_parameters(config)) if work.muon else 0
    activations, block = activations_of(work)
    # the loss: a chunk of logits, and hidden states with their gradients; the first step back through a block then
    # holds gradients of its feed-forward layer instead
    chunk = min(tokens, max(FEWEST_ROWS, CHUNK_LOGITS.get(work.device, CHUNK_LOGITS["cuda"]) // V))
    logits = VALUE * (chunk * V + 2 * tokens * D) if config.lm else 0
    first = max(0, VALUE * tokens * (2 * config.intermediate_size + 2 * D) - logits)
    # the gradient of the output embedding comes with the loss, beside its last part; the others as activations go
    gradients = VALUE * 2 * V * D * (config.lm and work.whole) + VALUE * trained * work.accumulated
    loss = {"gradients": gradients, "activations": activations, "logits": logits, "buffers": first}
    gaps = GAPS + GAPS_BY_TORCH * (not native_kernels(work)) + GAPS_BY_RECOMPUTING * work.checkpointed
    gaps += GAPS_BY_GRADIENTS * (work.accumulated and work.whole)
    loss["buffers"] += gaps * block
    # Muon: updates, their stack, its normed copy, the results and their stack
    group = min(matrices, max(UPDATE_NUMBERS, config.intermediate_size * D))
    update = {"gradients": VALUE * trained, "activations": 0, "logits": 0, "buffers": VALUE * 5 * group}
    return MemoryEstimate(
        process=PROCESS_BYTES if work.device == "cpu" else 0,
        trained_weights=VALUE * trained,
        frozen_weights=VALUE * max(0, work.parameters - trained),
        moments=VALUE * (2 * trained - matrices),
        average=VALUE * trained * work.average,
        best=VALUE * trained,
        **max(loss, update, key=lambda moment: sum(moment.values())),
    )


def step_flops_per_token(work: Work) -> float:
    """Operations for each token of a step: forward, gradients of the activations, and of the trained weights."""
    forward = forward_flops_per_token(work.config, work.length)
    if work.backward_layers is not None:
        backward = 2.0 * work.backward_layers / work.config.num_layers
    else:
        backward = 1.0 + min(1.0, work.learned / work.parameters)
    return forward * (1.0 + backward + work.checkpointed)


# What to change -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """A way to need less memory.

    Attributes:
        flag: what to add to the command.
        memory: peak bytes then.
        fits: whether that is enough.
        effect: what else it changes, in the user's language.
    """

    flag: str
    memory: int
    fits: bool
    effect: str


def lora_parameters(config: TransformerConfig, rank: int = LORA_RANK) -> int:
    """Parameters of adapters at every linear layer inside the blocks of a decoder or an encoder."""
    D, N = config.hidden_size, config.head_dim
    attention = 2 * (D + config.num_heads * N) + 2 * (D + config.num_kv_heads * N)
    return rank * config.num_layers * (attention + (3 if config.gated else 2) * (D + config.intermediate_size))


def fits(memory: int, available: int) -> bool:
    """Whether so many bytes find room."""
    return memory <= available


def changes(work: Work, available: int, smaller: Mapping[str, TransformerConfig] | None = None) -> list[Change]:
    """What to change where a run will not fit, the gentlest first; nothing where it fits.

    Args:
        available: bytes of free memory.
        smaller: smaller networks by the flag that chooses them, the largest first. Without them, the last answer is how
            large a base may be.
    """

    def tried(flag: str, other: Work, effect: str) -> Change:
        memory = memory_of(other).total
        return Change(flag, memory, fits(memory, available), effect)

    if fits(memory_of(work).total, available):
        return []
    found: list[Change] = []
    best, flags = work, []
    same = pick("the result stays the same", "结果不变")
    if work.micro_batch > 1:
        best = replace(work, accumulated=True)
        while best.micro_batch > 1 and not fits(memory_of(best).total, available):
            best = replace(best, micro_batch=best.micro_batch // 2)
        flags = [f"--micro-batch {best.micro_batch}"]
        found.append(tried(flags[0], best, same))
    if not work.checkpointed and work.backward_layers is None:
        effect = pick("the same result, about a third slower", "结果不变，速度约慢三分之一")
        found.append(tried("--activation-checkpointing", replace(work, checkpointed=True), effect))
        best, flags = replace(best, checkpointed=True), [*flags, "--activation-checkpointing"]
    context = work.length
    while context // 2 >= LEAST_CONTEXT and not fits(memory_of(replace(work, length=context)).total, available):
        context //= 2
    if context < work.length:
        effect = pick("the model sees less at once", "模型一次看到的内容更少")
        found.append(tried(f"--context {context}", replace(work, length=context), effect))
    if smaller is None and work.whole and work.config.encoder is None:  # to train from the beginning, they are no use
        count = lora_parameters(work.config)
        lora = {"trained": count, "adapters": count, "muon": False}
        effect = pick(
            f"trains {human_count(count)} instead of {human_count(work.parameters)} parameters",
            f"只训练 {human_count(count)} 个参数，而非 {human_count(work.parameters)}",
        )
        found.append(tried("--lora", replace(work, **lora), effect))  # type: ignore[arg-type]
        best, flags = replace(best, **lora), [*flags, "--lora"]  # type: ignore[arg-type]
    if not any(change.fits for change in found) and len(flags) > 1:
        found.append(tried(" ".join(flags), best, pick("all of these together", "以上各项合用")))
    return [*found, *smaller_models(work, available, smaller)]


def smaller_models(work: Work, available: int, smaller: Mapping[str, TransformerConfig] | None) -> list[Change]:
    """The largest of the smaller networks that fits; or how large a base may be."""
    if smaller is None:
        process = memory_of(work).process
        share = max(0, available - process) / (memory_of(work).total - process)
        count = human_count(math.floor(work.parameters * share))
        size = pick(f"a base of at most {count} parameters", f"参数不超过 {count} 的基础模型")
        return [Change(f"--base ({size})", available, share > 0, pick("a smaller model", "更小的模型"))]
    for micro in sorted({work.micro_batch, 1}, reverse=True):
        for flag, config in smaller.items():
            memory = memory_of(replace(work, config=config, micro_batch=micro, accumulated=True)).total
            if fits(memory, available):
                flag += "" if micro == work.micro_batch else f" --micro-batch {micro}"
                count = human_count(num_parameters(config))
                return [Change(flag, memory, True, pick(f"a model of {count} parameters", f"参数量 {count} 的模型"))]
    return []


def describe_changes(found: list[Change]) -> str:
    """The changes as a table, in the user's language."""
    width = max((display_width(change.flag) for change in found), default=0)
    lines = []
    for change in found:
        verdict = pick("fits", "放得下") if change.fits else pick("still too much", "仍然放不下")
        gap = " " * (width - display_width(change.flag) + 2)
        lines.append(f"  {change.flag}{gap}{human_bytes(change.memory)} ({verdict}; {change.effect})")
    return "\n".join(lines)


# Everything -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    Attributes:
        available: bytes of free memory.
        tokens, tokens_per_second, seconds: of the whole run.
        changes: what to change if it will not fit.
    """

    memory: MemoryEstimate
    parameters: int
    learned: int
    available: int
    tokens: float
    tokens_per_second: float
    seconds: float
    power: Power
    changes: tuple[Change, ...]

    @property
    def fits(self) -> bool:
        """Whether the memory is enough."""
        return fits(self.memory.total, self.available)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for ``--json`` and the report."""
        return {
            "parameters": {"trained": self.learned, "frozen": self.parameters - self.learned},
            "memory": {**asdict(self.memory), "total": self.memory.total, "available": self.available},
            "fits": self.fits,
            "tokens": self.tokens,
            "tokens_per_second": self.tokens_per_second,
            "seconds": self.seconds,
            "power": asdict(self.power),
            "watt_hours": self.power.watt_hours(self.seconds),
            "changes": [asdict(change) for change in self.changes],
        }

    def describe(self) -> str:
        """The estimates for people, in their language."""
        parts = ", ".join(f"{name} {size}" for name, size in self.memory.rows().items())
        hours = self.power.watt_hours(self.seconds)
        energy = f"{hours / 1000:.2f} kWh" if hours >= 1000 else f"{hours:.2g} Wh" if hours < 10 else f"{hours:.0f} Wh"
        lines = {
            pick("parameters", "参数量"): pick(
                f"{human_count(self.learned)} trained, {human_count(self.parameters - self.learned)} frozen",
                f"训练 {human_count(self.learned)}，冻结 {human_count(self.parameters - self.learned)}",
            ),
            pick("memory", "内存"): pick(
                f"{human_bytes(self.memory.total)} of {human_bytes(self.available)} that are free ({parts})",
                f"{human_bytes(self.memory.total)}，空闲 {human_bytes(self.available)}（{parts}）",
            ),
            pick("time", "时间"): pick(
                f"{human_time(self.seconds)} for {human_count(self.tokens)} tokens at "
                f"{self.tokens_per_second:,.0f} tok/s",
                f"{human_time(self.seconds)}（{human_count(self.tokens)} 词元，{self.tokens_per_second:,.0f} 词元/秒）",
            ),
            pick("energy", "能耗"): pick(
                f"about {energy} at {self.power.watts:.0f} W ({self.power.source})",
                f"约 {energy}，按 {self.power.watts:.0f} W 计（{self.power.source}）",
            ),
        }
        text = "\n".join(f"  {name}{' ' * (13 - display_width(name))}{value}" for name, value in lines.items())
        if self.changes:
            text += "\n" + pick("it will not fit; what to change:", "内存放不下，可以这样改：")
            text += "\n" + describe_changes(list(self.changes))
        return text

    def require_memory(self) -> None:
        """Refuse a run that needs more than there is, even if the estimate is as wrong as it may be.

        On Linux, memory that is not there is not refused when it is asked for: the process is killed when it uses it.

        Raises:
            ResourceError: it will not fit.
        """
        if not fits(round(self.memory.total / CERTAINTY), self.available):
            raise ResourceError(
                f"the run needs about {human_bytes(self.memory.total)} of memory, "
                f"{human_bytes(self.available)} are free",
                why="the system would kill it in the middle",
                fix="change one of these:\n" + describe_changes(list(self.changes)),
                zh=f"训练约需 {human_bytes(self.memory.total)} 内存，"
                f"空闲仅 {human_bytes(self.available)}，运行中会被系统终止。可以这样改：\n"
                + describe_changes(list(self.changes)),
            )


def estimate(
    work: Work,
    *,
    tokens: float,
    tokens_per_second: float,
    available: int,
    power: Power,
    seconds: float | None = None,
    smaller: Mapping[str, TransformerConfig] | None = None,
) -> Estimate:
    """Everything a run will take.

    Args:
        tokens: of the whole run.
        tokens_per_second: from the machine's measured speed (:meth:`hanmo.training.plan.Machine.speed`).
        available: bytes of free memory.
        seconds: the budget of a run by time; default: tokens / tokens_per_second.
        smaller: see :func:`changes`.
    """
    return Estimate(
        memory=memory_of(work),
        parameters=work.parameters,
        learned=work.learned,
        available=available,
        tokens=tokens,
        tokens_per_second=tokens_per_second,
        seconds=tokens / tokens_per_second if seconds is None else seconds,
        power=power,
        changes=tuple(changes(work, available, smaller)),
    )
