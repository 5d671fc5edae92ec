"""``--base new``: an encoder-decoder that begins with random weights and a vocabulary of the records themselves.

The network is the Transformer of Vaswani et al. (2017), made small: pairs are few where one learns from nothing, and a
network of their base size would know them by heart. One vocabulary serves both sides, so that names, numbers and
signs are the same tokens on both.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hanmo.cli.finetune import NEW, SIZES, FinetuneSettings
from hanmo.errors import DataError

if TYPE_CHECKING:
    from hanmo.cli.splits import Splits
    from hanmo.models.checkpoints.weights import LoadedModel
    from hanmo.settings import Resolution

HEAD_DIM = 64
MAX_POSITIONS = 512
FEW = 200_000  # pairs, both directions counted
LOW_RESOURCE_DROPOUT = 0.3
PREFIXES = {"zh": "zh: ", "en": "en: "}  # what a source begins with that is to become the language


def settle_new(settings: FinetuneSettings, resolution: Resolution, pairs: int) -> None:
    """What keeps a network from knowing its pairs by heart; a base that is read brings its own dropout."""
    if settings.base != NEW:
        return
    few = pairs < FEW
    reason = "Araabi and Monz 2020, for few pairs" if few else "Vaswani et al. 2017, table 3"
    resolution.compute(settings, "dropout", LOW_RESOURCE_DROPOUT if few else 0.1, reason)
    resolution.compute(settings, "smoothing", 0.1, "Vaswani et al. 2017, table 3")


def new_base(settings: FinetuneSettings, splits: Splits) -> tuple[Path, LoadedModel]:
    """The untrained network and its vocabulary, in the form of a base that was read.

    Raises:
        UsageError: a vocabulary without room for bytes.
        DataError: there is no text.
    """
    from dataclasses import replace

    from hanmo.models.architectures.bart import original_transformer
    from hanmo.models.checkpoints.weights import LoadedModel
    from hanmo.models.transformer import Transformer
    from hanmo.text.training import train_bpe

    tokenizer = train_bpe((text for record in splits.train for text in (record.source, record.target)),
                          settings.vocab_size)  # fmt: skip
    width, layers = SIZES[settings.size]
    config = original_transformer(tokenizer.vocab_size, width, layers, max(1, width // HEAD_DIM), 4 * width)
    assert config.encoder is not None
    assert settings.dropout is not None
    free = {"max_position_embeddings": MAX_POSITIONS, "dropout": settings.dropout}
    encoder = replace(config.encoder, **free)  # type: ignore[arg-type]
    config = replace(config, encoder=encoder, **free)  # type: ignore[arg-type]
    model = Transformer(config)
    model.initialize(settings.seed)
    ends = {"eos_token_id": [tokenizer.eos_id], "pad_token_id": tokenizer.pad_id, "bos_token_id": None}
    generation: dict[str, Any] = {**ends, "decoder_start_token_id": tokenizer.pad_id}
    return Path(NEW), LoadedModel(config, model.state_dict(), tokenizer, generation, NEW, checked=True)


def both_ways(records: Sequence[Any]) -> list[Any]:
    """Each pair in both directions; a source begins with the language that it is to become.

    Raises:
        DataError: not one side of the records is Chinese and the other is not.
    """
    from hanmo.data.tasks.types import Pair
    from hanmo.tasks.prompts import mostly_chinese

    chinese = [mostly_chinese([getattr(record, side) for record in records]) for side in ("source", "target")]
    if chinese[0] == chinese[1]:
        raise DataError(
            "--both-ways needs pairs of Chinese and another language",
            where=records[0].file if records else "",
            fix="leave it out, and train one direction; or look at which columns are taken (--fields)",
            zh="--both-ways 要求一侧为中文、另一侧为其他语言；请去掉该选项，或用 --fields 指定列",
        )
    there, back = ("en", "zh") if chinese[0] else ("zh", "en")
    out: list[Any] = []
    for record in records:
        place = {"file": record.file, "line": record.line}
        out.append(Pair(PREFIXES[there] + record.source, record.target, record.references, **place))
        out.append(Pair(PREFIXES[back] + record.target, record.source, **place))
    return out
