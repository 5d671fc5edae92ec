"""Settings of the trainer that a user can set; free of torch, so that ``--help`` stays instant."""

from __future__ import annotations

from dataclasses import dataclass

from hanmo.errors import UsageError
from hanmo.settings import flag, option, parse_duration

ARCHITECTURES = ("transformer", "lstm", "gru", "rnn", "ngram")
SIZES = ("nano", "micro", "mini", "small", "medium", "base", "large")
OBJECTIVES = ("causal", "masked")
OPTIMIZERS = ("muon", "adamw")
PRECISIONS = ("fp32", "int8", "bf16")
LEAST = {  # the smallest values that make sense
    "max_steps": 1,
    "order": 1,
    "context": 8,
    "batch_size": 1,
    "micro_batch": 1,
    "checkpoint_every": 1,
    "weight_decay": 0,
    "clip": 0,
    "patience": 1,
    "keep_best": 1,
    "devices": 1,
}
STEPS_ONLY = (  # settings that an n-gram model does not have
    "objective",
    "size",
    "budget",
    "max_steps",
    "epochs",
    "context",
    "batch_size",
    "micro_batch",
    "learning_rate",
    "optimizer",
    "dropout",
    "weight_decay",
    "clip",
    "cooldown",
    "average",
    "patience",
    "search",
    "keep_best",
    "precision",
    "checkpoint_every",
    "resume",
    "track",
    "devices",
    "shard",
    "activation_checkpointing",
)
TRANSFORMER_ONLY = ("objective", "precision", "devices", "shard", "activation_checkpointing")


@dataclass
class LoopSettings:
    """How to train and for how long, for every kind of training. What is left out is computed and explained."""

    budget: str | None = option(
        None,
        "time to train, e.g. 90s, 3min, 2h",
        zh="训练时间，如 90s、3min、2h",
        metavar="TIME",
    )
    max_steps: int | None = option(
        None,
        "train exactly so many steps instead of a time: makes runs repeatable bit for bit",
        zh="按步数训练（而非按时间）：结果可逐位重现",
    )
    epochs: float | None = option(
        None,
        "train for so many passes over the data instead of a time: repeatable bit for bit, too",
        zh="按遍数训练（而非按时间）：同样可逐位重现",
    )
    context: int | None = option(
        None,
        "tokens the model sees at once; in a recurrent network, those the gradient runs through",
        zh="上下文长度（词元数）；循环网络中为梯度截断的长度",
    )
    batch_size: int | None = option(None, "sequences per step", zh="每步的序列数")
    micro_batch: int | None = option(
        None,
        "sequences at a time; lower it if memory runs out (the result is the same)",
        zh="每次计算的序列数；内存不足时调小（结果不变）",
    )
    learning_rate: float | None = option(None, "peak learning rate", zh="峰值学习率")
    weight_decay: float | None = option(
        None,
        "decoupled weight decay of the matrices; default: 0.05, in fine-tuning 0.01",
        zh="矩阵参数的权重衰减；默认 0.05，微调为 0.01",
    )
    clip: float = option(1.0, "largest norm of the gradient; 0 turns clipping off", zh="梯度范数上限；0 为不裁剪")
    cooldown: float | None = option(
        None,
        "last share of the run in which the rate falls; 1: from the beginning on",
        zh="学习率下降的阶段占全程的比例；1 表示从头开始下降",
    )
    average: float = option(
        0.0,
        "decay of a moving average of the weights, which is then kept instead of them, e.g. 0.999; 0: none",
        zh="权重滑动平均的衰减系数（如 0.999），启用后保留平均权重；0 为不用",
    )
    patience: int | None = option(
        None, "stop after so many evaluations without a better one", zh="连续多少次评测没有进步就提前停止"
    )
    search: float | None = option(
        None,
        "before the run, try learning rates, batch sizes and what else matters in short trials for so many minutes",
        zh="运行之前，先用这么多分钟做短试验，搜索学习率、批大小等关键设置",
        metavar="MINUTES",
    )
    keep_best: int = option(1, "how many of the best weights to keep under best/", zh="在 best/ 中保留多少组最佳权重")
    precision: str = option(
        "fp32",
        "of the products inside the blocks: fp32; int8 (faster on CPUs); bf16 (GPUs)",
        zh="层内矩阵乘法的精度：fp32；int8（CPU 上更快）；bf16（GPU）",
        choices=PRECISIONS,
    )
    checkpoint_every: int | None = option(
        None, "steps between checkpoints; default: about once a minute", zh="检查点间隔步数；默认约每分钟一次"
    )
    resume: bool = option(False, "go on from the newest checkpoint of this run", zh="从最近的检查点继续")
    track: list[str] = option(
        [],
        "also tell these trackers, if installed: tensorboard, wandb, mlflow",
        zh="同时写入这些跟踪器（需已安装）：tensorboard、wandb、mlflow",
        metavar="NAME",
    )
    devices: int = option(1, "processes that train together on this machine", zh="本机参与训练的进程数")
    shard: bool = option(
        False,
        "divide weights and optimizer between the processes (FSDP), for models that one device cannot hold",
        zh="把权重与优化器状态分摊到各进程（FSDP），用于单个设备放不下的模型",
    )
    activation_checkpointing: bool = option(
        False,
        "compute activations again in the backward pass: much less memory, a third slower",
        zh="反向传播时重新计算激活值：内存大减，速度约慢三分之一",
    )
    seed: int = option(0, "seed of weights and data order", zh="随机种子")
    device: str = option("auto", "cpu, cuda, cuda:1, mps or auto", zh="设备：cpu、cuda、cuda:1、mps 或 auto")

    def check_loop(self) -> None:
        """Raise UsageError for values that cannot work, before any file is read."""
        for name, least in LEAST.items():
            value = getattr(self, name, None)
            if value is not None and value < least:
                raise UsageError(
                    f"{flag(name)} is {value}, and must be {least:g} or more",
                    zh=f"{flag(name)} 为 {value}，至少应为 {least:g}",
                )
        for name in ("learning_rate", "epochs", "search"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UsageError(
                    f"{flag(name)} must be above 0", fix="leave it out", zh=f"{flag(name)} 必须大于 0，可省略"
                )
        for name in ("average", "cooldown"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1 - (name == "average") * 1e-9:
                below = "below 1" if name == "average" else "1"
                raise UsageError(
                    f"{flag(name)} is a share from 0 to {below}",
                    fix="leave it out",
                    zh=f"{flag(name)} 应在 0 到 1 之间",
                )
        if self.budget is not None:
            parse_duration(self.budget)
        given = [flag(name) for name in ("budget", "max_steps", "epochs") if getattr(self, name) is not None]
        if len(given) > 1:
            raise UsageError(
                f"{given[0]} and {given[1]} are two answers to one question",
                fix="give only one of them",
                zh=f"{given[0]} 与 {given[1]} 只能给一个",
            )
        from hanmo.training.trackers import check_trackers

        check_trackers(self.track)
        if self.search is not None:
            from hanmo.training.search_space import require_optuna

            require_optuna()  # before any text is read


@dataclass
class TrainingSettings(LoopSettings):
    """What to train and for how long. Every value left out is computed, printed and explained."""

    architecture: str = option(
        "transformer",
        "the kind of model: a transformer, a recurrent network (lstm, gru, rnn), or Kneser-Ney n-grams",
        zh="模型种类：transformer、循环网络（lstm、gru、rnn）或 Kneser-Ney n 元模型",
        choices=ARCHITECTURES,
    )
    objective: str = option(
        "causal",
        "what a transformer learns: the next token (causal), or hidden words from both sides (masked)",
        zh="transformer 的训练目标：预测下一个词元（causal），或根据两侧补全被遮住的词（masked）",
        choices=OBJECTIVES,
    )
    optimizer: str = option(
        "muon",
        "muon for the matrices with adamw for the rest, or adamw for all",
        zh="优化器：矩阵用 muon、其余用 adamw，或全部用 adamw",
        choices=OPTIMIZERS,
    )
    order: int | None = option(None, "tokens of the longest n-gram; default 5", zh="n 元模型的最高阶；默认 5")
    size: str | None = option(
        None, "model size; default: what the budget can train well", zh="模型大小；默认按预算选择", choices=SIZES
    )
    dropout: float | None = option(
        None,
        "share of features left out while a recurrent network trains; default by the number of passes",
        zh="循环网络训练时的 dropout 比例；默认按遍数选择",
    )

    def check_training(self) -> None:
        """Raise UsageError for values that cannot work, before any file is read."""
        self.check_loop()
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise UsageError(
                "--dropout is a share from 0 to below 1", fix="leave it out", zh="--dropout 应在 0 到 1 之间（不含 1）"
            )
        self.check_architecture()

    def check_architecture(self) -> None:
        """Raise UsageError for a setting that the chosen kind of model does not have."""
        usual = TrainingSettings()
        if self.architecture == "ngram":
            strange = [name for name in STEPS_ONLY if getattr(self, name) != getattr(usual, name)]
            why, zh = "its n-grams are counted, it is not trained in steps", "n 元模型靠计数得到，没有逐步训练"
        else:
            recurrent = self.architecture != "transformer"
            others = ("order", *(TRANSFORMER_ONLY if recurrent else ("dropout",)))
            strange = [name for name in others if getattr(self, name) != getattr(usual, name)]
            why, zh = "this kind of model has nothing of that name", "此类模型没有这个设置"
        if strange:
            raise UsageError(
                f"{flag(strange[0])} means nothing for --architecture {self.architecture}",
                why=why,
                fix="leave it out",
                zh=f"{flag(strange[0])} 对 --architecture {self.architecture} 不起作用：{zh}。请去掉",
            )
