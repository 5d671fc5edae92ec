"""The text that quantisation is calibrated with: files of the user, or what the model itself writes.

Of several files each gives as much, from places spread over all of it. Without files the model continues a few short
openings in English, Chinese and Python, each token drawn from its own predictions: so every kind of text that it knows
has the share that it gives it.

Letters in names: B windows, T tokens of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hanmo.data.readers import Reader
from hanmo.data.settings import DataSettings
from hanmo.data.sources import find_sources
from hanmo.errors import DataError
from hanmo.folder import sha256_file
from hanmo.inference.language_model import LanguageModel
from hanmo.inference.sampling import Sampling
from hanmo.language import pick
from hanmo.progress import Progress
from hanmo.settings import notice

TOKENS = 16_384  # twice as many gain about 3 %
WINDOW = 512
FEWEST = 4_096  # with fewer, a notice says so
READ_AT_MOST = 2_000_000  # characters of a file
OPENINGS = (
    "The",
    "Once upon a time",
    "In 1869, the",
    "What is the difference between",
    "She looked at him and said:",
    "# Introduction\n\n",
    "How do I",
    "Question:",
    "从前",
    "话说",
    "中国",
    "他笑道：“",
    "如何",
    "问：",
    "本文介绍",
    "今天",
    "import ",
    "def ",
    "class ",
    '{"',
)


@dataclass(frozen=True)
class CalibrationText:
    """Text to calibrate with.

    Attributes:
        tokens_BT: int64, windows; each begins with the tokens that every prompt of the model begins with.
        record: where it is from, as plain data.
    """

    tokens_BT: Tensor
    record: dict[str, Any]


def text_of_files(paths: Sequence[str | Path], model: LanguageModel) -> CalibrationText:
    """Windows from files of any kind that Hanmo reads.

    Raises:
        DataError: a file is missing or cannot be read, or there is less than one window of text.
    """
    window = min(WINDOW, model.context_length)
    length, wanted = window - len(model.prompt_prefix), max(1, TOKENS // window)
    sources = find_sources(paths).sources
    files, windows = [], list[Tensor]()
    for number, source in enumerate(sources):
        share = wanted * (number + 1) // len(sources) - wanted * number // len(sources)
        ids, characters = list[int](), 0
        for document in Reader([source], DataSettings()).documents():
            ids += model.tokenizer.encode(document.text[: READ_AT_MOST - characters])
            characters += len(document.text)
            if characters >= READ_AT_MOST:
                break
        here = len(ids) // length
        places = [here * i // max(1, min(share, here)) for i in range(min(share, here))]
        windows += [
            torch.tensor([*model.prompt_prefix, *ids[place * length : (place + 1) * length]]) for place in places
        ]
        files.append({"file": Path(source.name).name, "sha256": sha256_file(source.path), "windows": len(places)})
    given = ", ".join(map(str, paths))
    if not windows:
        raise DataError(
            f"there are fewer than {length} tokens of text to calibrate with in any file",
            where=given,
            why="what matters to the model is measured on whole windows of text",
            fix=f"give longer texts, about {TOKENS:,} tokens in all, or leave --calibration out",
            zh=f"任何一个文件都不足 {length} 个词元，无法校准。请给出更长的文本（共约 {TOKENS:,} 个词元），"
            "或去掉 --calibration",
        )
    tokens_BT = torch.stack(windows)
    if tokens_BT.numel() < min(FEWEST, wanted * window):
        notice(
            pick(
                f"{given}: only {tokens_BT.numel():,} tokens to calibrate with; about {TOKENS:,} are better",
                f"{given}：校准文本只有 {tokens_BT.numel():,} 个词元，建议约 {TOKENS:,} 个",
            )
        )
    return CalibrationText(tokens_BT, {"files": files, "tokens": tokens_BT.numel(), "window": window})


def own_text(model: LanguageModel, *, seed: int = 0, progress: bool = False) -> CalibrationText:
    """Windows that the model writes, at temperature 1.

    Args:
        seed: the first window is drawn with it, the next with the number after it, and so on.
        progress: whether to show how far the work is.

    Raises:
        ModelError: it computes NaN or infinite values.
    """
    window = min(WINDOW, model.context_length)
    openings = [OPENINGS[row % len(OPENINGS)] for row in range(max(1, TOKENS // window))]
    rows = [model.encode_prompt(opening)[: window - 1] for opening in openings]
    requests = []
    for row, ids in enumerate(rows):
        sampling = Sampling(max_new_tokens=window, temperature=1.0, seed=seed + row, ignore_eos=True)
        requests.append(model.engine.submit(ids, sampling, room=window - len(ids), index=row))
    tokens = len(rows) * window
    bar = Progress(pick("writing text to calibrate with", "生成校准文本"), tokens, "tokens") if progress else None
    for chunk in model.engine.chunks(requests):
        rows[chunk.index] += chunk.ids
        if bar:
            bar.update(sum(map(len, rows)))
    if bar:
        bar.close()
    return CalibrationText(torch.tensor(rows), {"files": [], "tokens": tokens, "window": window, "seed": seed})
