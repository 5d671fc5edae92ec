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
OPENINGS = (  # long enough that a model stays with their language and kind
    "The old man put his lamp on the table and looked at the letter for a long time. Nobody in the village had written "
    "to him for twenty years. At last he broke the seal, and",
    "村口的老槐树下坐着几个乘凉的人。天色渐渐暗了，远处传来几声狗叫。老张放下手里的茶碗，慢慢地说：“这件事说来话长，"
    "那年我才十七岁，跟着父亲到城里去卖粮。走到半路，忽然下起大雨，我们只好躲进一座破庙。谁知庙里已经有人了，",
    'def merge_intervals(intervals):\n    """Join the intervals that overlap, and return them in order."""\n'
    "    result = []\n    for start, end in sorted(intervals):\n",
    "Volcanic islands form where molten rock rises through the floor of the ocean. Over millions of years",
    "茶树原产于中国西南部，喜欢温暖湿润的气候和酸性土壤。根据制作方法的不同，茶叶可以分为绿茶、红茶、乌龙茶、白茶、"
    "黄茶和黑茶六大类。绿茶不经过发酵，保留了较多的茶多酚；红茶则经过完全发酵，因此颜色较深，味道醇厚。饮茶的习惯",
    "Question: Why does the moon always show us the same side?\n\nAnswer:",
    "问：我最近总是睡不好，晚上躺下一两个小时都睡不着，白天又没有精神，应该怎么办？\n\n"
    "答：首先不要着急。可以先从生活习惯上做一些调整：第一，每天在固定的时间起床；第二，下午以后不要喝咖啡和浓茶；第三，",
    "import json\nfrom pathlib import Path\n\n\nclass Store:\n    def __init__(self, path):\n"
    "        self.path = Path(path)\n",
    "Dear Ms. Carter,\n\nThank you for your message of last Tuesday. We have looked into the matter, and",
    "记者昨天从市交通局了解到，为方便市民出行，全市将在年底前新增公交线路十二条，并对三十多个路口的信号灯进行改造。"
    "有关负责人表示，工程分两个阶段进行，预计今年十月完成第一阶段。不少市民对此表示欢迎，也有人担心施工期间",
    '"You can\'t be serious," she said, and closed the door behind her. "After all that has happened?"\n\n"I am,"',
    "却说那日众人在厅上饮酒，忽见一个小厮慌慌张张跑来，回道：“老爷，外面来了一位先生，说有要紧的话要当面说。”"
    "老爷听了，忙命人请进来。不多时，只见那人头戴方巾，身穿青衫，走上前来深深作了一个揖，笑道：",
    "# How to plant a tree\n\nYou need a spade, some water and a young tree. Follow these steps:\n\n1.",
    "例题：甲、乙两地相距三百六十千米，一辆汽车从甲地开往乙地，每小时行六十千米；另一辆汽车同时从乙地开往甲地，"
    "每小时行三十千米。两车经过几小时相遇？\n\n解：两车每小时共行",
    "#include <stdio.h>\n\nint main(void) {\n    int count = 0;\n",
    "In this paper we study how small errors in the weights of a neural network change its predictions. We show that",
    "本文研究了城市绿地面积与居民健康之间的关系。我们收集了二十个城市十年间的数据，采用回归分析的方法，在控制收入、年龄"
    "和教育水平之后，发现绿地面积每增加一个百分点，居民的平均运动时间就会",
    '{"name": "Anna", "age": 31, "languages": ["English", "中文"], "address": {"city":',
    "The history of the city goes back to the twelfth century, when a bridge was built across the river. In 1348",
    "今天我们来学习怎样做西红柿炒鸡蛋。先准备三个鸡蛋、两个西红柿、一根小葱。第一步，把鸡蛋打散，加一点盐；"
    "第二步，把西红柿洗净，切成小块；第三步，锅里放油，油热以后",
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
    rows = [[*model.prompt_prefix, *model.tokenizer.encode(opening)][: window // 2] for opening in openings]
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
    return CalibrationText(torch.tensor(rows), {"files": [], "tokens": tokens, "window": window})
