"""The control tokens round a text that a network expects: ``[CLS] a [SEP] b [SEP]`` and its relatives.

:class:`~hanmo.text.tokenizer.Tokenizer` never adds any; what its file says about them is read here and put round the
ids, so that no text can bring one itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hanmo.errors import ModelError
from hanmo.text.tokenizer import Tokenizer

Slot = tuple[tuple[int, ...] | str, int]  # control tokens, or "A" or "B" for a text; and the segment they belong to
PLAIN: tuple[Slot, ...] = (("A", 0),)


@dataclass(frozen=True)
class Wrapped:
    """Ids with their segments, both of one length, and the places at which the texts begin."""

    ids: list[int]
    types: list[int]
    starts: tuple[int, ...]


@dataclass(frozen=True)
class Wrapping:
    """What stands round one text and round a pair.

    >>> bert = Wrapping.between((101,), (102,), (102,), second_type=1)
    >>> bert.wrap([7, 8], [9])
    Wrapped(ids=[101, 7, 8, 102, 9, 102], types=[0, 0, 0, 0, 1, 1], starts=(1, 4))
    """

    single: tuple[Slot, ...] = PLAIN
    pair: tuple[Slot, ...] = (("A", 0), ("B", 1))

    @classmethod
    def between(
        cls, before: tuple[int, ...], middle: tuple[int, ...], after: tuple[int, ...], second_type: int = 0
    ) -> Wrapping:
        """``before`` and ``after`` stand round every input, ``middle`` between the texts of a pair."""
        single = ((before, 0), ("A", 0), (after, 0))
        return cls(single, ((before, 0), ("A", 0), (middle, 0), ("B", second_type), (after, second_type)))

    def overhead(self, *, pair: bool = False) -> int:
        """How many control tokens are added."""
        return sum(len(part) for part, _ in (self.pair if pair else self.single) if isinstance(part, tuple))

    def wrap(self, first: Sequence[int], second: Sequence[int] | None = None) -> Wrapped:
        """The ids of one text or of a pair with the control tokens round them."""
        ids: list[int] = []
        types: list[int] = []
        starts: list[int] = []
        for part, kind in self.single if second is None else self.pair:
            if isinstance(part, str):
                starts.append(len(ids))
                part = tuple(first if part == "A" or second is None else second)
            ids += part
            types += [kind] * len(part)
        return Wrapped(ids, types, tuple(starts))

    @property
    def prefix(self) -> list[int]:
        """Control tokens before a single text."""
        return self._around()[0]

    @property
    def suffix(self) -> list[int]:
        """Control tokens after a single text."""
        return self._around()[1]

    def _around(self) -> tuple[list[int], list[int]]:
        sides: tuple[list[int], list[int]] = ([], [])
        after = 0
        for part, _ in self.single:
            if isinstance(part, str):
                after = 1
            else:
                sides[after].extend(part)
        return sides


def wrapping_of(tokenizer: Tokenizer, *, causal: bool = False) -> Wrapping:
    """The wrapping of a tokenizer: its post-processor; without one, CLS and SEP, else BOS and EOS, where it has both.

    Args:
        causal: the network reads from left to right; then nothing is added that the file does not ask for.

    Raises:
        ModelError: the post-processor names ids that do not exist.
    """
    if tokenizer.post_processor is not None:
        wrapping = read_processor(tokenizer.post_processor)
        used = [id for part, _ in (*wrapping.single, *wrapping.pair) if isinstance(part, tuple) for id in part]
        if any(not 0 <= id < tokenizer.vocab_size for id in used):
            raise ModelError(
                f"the post-processor adds the token {max(used)}, which the vocabulary does not have",
                where="tokenizer.json",
                fix="copy the file again from where it came",
                zh=f"tokenizer.json 的后处理用到了词表中没有的编号 {max(used)}。请重新复制该文件",
            )
        return wrapping
    if causal:
        return Wrapping()
    if tokenizer.cls_id is not None and tokenizer.sep_id is not None:
        cls, sep = (tokenizer.cls_id,), (tokenizer.sep_id,)
        if tokenizer.sep_id == tokenizer.eos_id:  # RoBERTa, whose SEP is its EOS, doubles it between two texts
            return Wrapping.between(cls, sep * 2, sep)
        return Wrapping.between(cls, sep, sep, second_type=1)
    if tokenizer.bos_id is not None and tokenizer.eos_id is not None:
        return Wrapping.between((tokenizer.bos_id,), (tokenizer.eos_id,), (tokenizer.eos_id,))
    return Wrapping()


def read_processor(processor: Mapping[str, Any]) -> Wrapping:
    """The wrapping that a ``post_processor`` of ``tokenizer.json`` describes.

    Raises:
        ModelError: it is of no known form.
    """
    kind = processor.get("type")
    try:
        if kind == "Sequence":
            found = [read_processor(stage) for stage in processor["processors"]]
            return next((wrapping for wrapping in reversed(found) if wrapping.overhead()), Wrapping())
        if kind == "TemplateProcessing":
            special = {name: tuple(entry["ids"]) for name, entry in (processor.get("special_tokens") or {}).items()}
            single, pair = (tuple([read_slot(slot, special) for slot in processor[key]]) for key in ("single", "pair"))
            return Wrapping(single, pair)
        if kind in ("BertProcessing", "RobertaProcessing"):
            cls, sep = (processor["cls"][1],), (processor["sep"][1],)
            if kind == "BertProcessing":
                return Wrapping.between(cls, sep, sep, second_type=1)
            return Wrapping.between(cls, sep * 2, sep)
        if kind == "ByteLevel":  # only moves offsets
            return Wrapping()
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        kind = f"{kind} with {type(error).__name__} {error}"
    raise ModelError(
        f"the post-processor '{kind}' is not known",
        where="tokenizer.json",
        why="it decides which control tokens stand round a text",
        fix="known: TemplateProcessing, BertProcessing, RobertaProcessing, ByteLevel, and sequences of them",
        zh=f"不认识 tokenizer.json 中的后处理 '{kind}'",
    )


def read_slot(slot: Mapping[str, Any], special: Mapping[str, tuple[int, ...]]) -> Slot:
    """One part of a template."""
    if "Sequence" in slot:
        return slot["Sequence"]["id"], slot["Sequence"]["type_id"]
    return special[slot["SpecialToken"]["id"]], slot["SpecialToken"]["type_id"]


def source_wrapping(tokenizer: Tokenizer, generation: Mapping[str, Any]) -> tuple[list[int], list[int], int]:
    """What an encoder-decoder needs: control tokens before and after its source, and the token its answer starts from.

    Args:
        tokenizer: the model's; EOS ends the source where the file has no post-processor (T5, BART and Marian do that).
        generation: the entries of ``generation_config.json``; ``decoder_start_token_id`` decides, else padding
            (T5, Marian), else BOS.

    Returns:
        ``(prefix, suffix, start_id)``.

    Raises:
        ModelError: nothing says where an answer starts.
    """
    if tokenizer.post_processor is None:
        prefix, suffix = [], [tokenizer.eos_id] if tokenizer.eos_id is not None else []
    else:
        wrapping = wrapping_of(tokenizer)
        prefix, suffix = wrapping.prefix, wrapping.suffix
    keys = ("decoder_start_token_id", "pad_token_id", "bos_token_id")
    candidates = [*(generation.get(key) for key in keys), tokenizer.pad_id, tokenizer.bos_id]
    start = next((id for id in candidates if id is not None), None)
    if type(start) is not int:
        raise ModelError(
            "nothing says from which token an answer starts",
            where="generation_config.json",
            fix="add decoder_start_token_id; the model's authors name it in config.json",
            zh="generation_config.json 没有说明答案的起始符号，请加入 decoder_start_token_id",
        )
    return prefix, suffix, start
