"""Settings of generation that a user can set; free of torch, so that ``--help`` stays instant."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from hanmo.settings import option

PRECISIONS = ("fp32", "fp16", "int8", "int4")
ENGINES = ("auto", "native", "torch")
CACHES = ("fp32", "fp16", "int8")


@dataclass
class EngineSettings:
    """Where and in which form a model computes; the meaning of each is told in ``hanmo.inference.loading.load``."""

    device: str = option("auto", "cpu, cuda, mps or auto", zh="设备")
    precision: str | None = option(
        None,
        "weights on a CPU: fp32, fp16, int8 (hardly any loss, two to four times as fast) or int4 (small loss, faster "
        "still); default: as they are stored, float32 if as floats",
        zh="CPU 上的权重精度：fp32、fp16、int8（几乎无损，快二至四倍）或 int4（略有损失，更快）；默认按存储的精度，"
        "浮点权重为 float32",
        choices=PRECISIONS,
    )
    engine: str = option(
        "auto",
        "what computes: native (C++, on CPUs), torch, or auto (native where it can)",
        zh="计算引擎：native（C++，用于 CPU）、torch，或 auto（能用则用 native）",
        choices=ENGINES,
    )
    kv_cache: str | None = option(
        None,
        "keys and values of texts in the native engine: fp32, fp16, or int8 (half the memory of fp16, a little less "
        "exact); default: fp32 where the weights are, else fp16",
        zh="本地引擎中文本的键值缓存：fp32、fp16 或 int8（内存为 fp16 的一半，略有误差）；权重为 fp32 时默认 fp32，"
        "否则默认 fp16",
        choices=CACHES,
    )

    def engine_options(self) -> dict[str, Any]:
        """Keyword options for :func:`hanmo.inference.loading.load`."""
        names = [item.name for base in (EngineSettings, WriterSettings) for item in fields(base)]
        return {name: getattr(self, name) for name in dict.fromkeys(names) if hasattr(self, name)}


@dataclass
class WriterSettings(EngineSettings):
    """The same for a model that writes."""

    draft: str | None = option(
        None,
        "a smaller model with the same tokenizer, which guesses ahead: the same text in less time",
        zh="分词器相同的较小模型，用来预先猜测后文：文本不变，速度更快",
        metavar="MODEL",
    )


@dataclass
class GenerationSettings:
    """How the next token is chosen and when to stop; the meaning of each is told in ``hanmo.inference.sampling``."""

    max_new_tokens: int = option(256, "at most so many new tokens", zh="最多生成的词元数")
    temperature: float = option(0.8, "0 takes the likeliest token, higher is more varied", zh="0 为贪心，越大越多样")
    top_k: int = option(0, "sample from the k likeliest tokens; 0 is off", zh="只在前 k 个词元中采样；0 为关闭")
    top_p: float = option(
        0.95, "sample from the likeliest tokens with this mass; 1 is off", zh="核采样的概率质量；1 为关闭"
    )
    min_p: float = option(
        0.0, "drop tokens below this share of the likeliest; 0 is off", zh="相对最大概率的下限；0 为关闭"
    )
    repetition_penalty: float = option(1.0, "make used tokens less likely; 1 is off", zh="重复惩罚；1 为关闭")
    no_repeat_ngram_size: int = option(
        0, "no run of so many tokens occurs twice; 0 is off", zh="禁止重复的 n 元组长度；0 为关闭"
    )
    seed: int | None = option(None, "the same seed gives the same text", zh="随机种子；相同种子得到相同文本")
    stop: list[str] = option(
        [], "end at this text; may be given several times", zh="遇到该文本即停止；可多次给出", metavar="TEXT"
    )

    def sampling_options(self) -> dict[str, Any]:
        """Keyword options for :meth:`LanguageModel.generate`."""
        return {item.name: getattr(self, item.name) for item in fields(GenerationSettings)}
