"""Settings of generation that a user can set; free of torch, so that ``--help`` stays instant."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from hanmo.settings import option


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
