"""Masked language models: words for the hidden places of a text, and how likely a network finds the words that stand.

Letters in names: M masked places, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hanmo.errors import ModelError, UsageError
from hanmo.inference.reading import BATCH_ROWS, Floats, check_words
from hanmo.models.transformer import Transformer

if TYPE_CHECKING:
    from hanmo.inference.encoder import TextEncoder

MASKS = ("[MASK]", "<mask>")  # understood as the model's own mask


class Candidate(NamedTuple):
    """A token for a masked place."""

    text: str
    probability: float
    id: int


@torch.inference_mode()
def fill_masks(encoder: TextEncoder, text: str, n: int) -> list[list[Candidate]]:
    """:meth:`hanmo.inference.encoder.TextEncoder.fill`."""
    tokenizer, model = encoder.tokenizer, encoder.model
    assert isinstance(model, Transformer)
    mask_id, mask = mask_of(encoder)
    (text,) = check_words([text])
    if type(n) is not int or n < 1:
        raise UsageError(f"n must be at least 1, not {n!r}", zh=f"n 应至少为 1，而不是 {n!r}")
    if mask not in text:  # beside the own mask, that of other models is text
        text = re.sub("|".join(map(re.escape, MASKS)), lambda _: mask, text)
    ids = tokenizer.encode_masked(text)
    places = [place for place, id in enumerate(ids) if id == mask_id]
    if not places:
        raise UsageError(
            f"there is no {mask} in the text",
            where=encoder.name,
            fix=f"put {mask} where a word is to be filled in",
            zh=f"文本中没有 {mask}，请在要填空的位置写上 {mask}",
        )
    V = min(tokenizer.vocab_size, model.config.vocab_size)
    control = torch.tensor(sorted(id for id in tokenizer.special_tokens.values() if id < V))
    found = []
    for start in range(0, len(places), BATCH_ROWS):
        hidden_MD = states_at(encoder, ids, places[start : start + BATCH_ROWS])
        probabilities_MV = model.logits(hidden_MD).softmax(-1).cpu()
        probabilities_MV[:, control] = -1.0
        best_MN, tokens_MN = probabilities_MV[:, :V].topk(min(n, V - len(control)))
        for best, tokens in zip(best_MN.tolist(), tokens_MN.tolist(), strict=True):
            found.append(
                [
                    Candidate(tokenizer.decode([id]).strip(), probability, id)
                    for probability, id in zip(best, tokens, strict=True)
                ]
            )
    return found


@torch.inference_mode()
def mask_each(encoder: TextEncoder, text: str) -> Floats:
    """:meth:`hanmo.inference.encoder.TextEncoder.pseudo_logprobs`."""
    model = encoder.model
    assert isinstance(model, Transformer)
    mask_id, _ = mask_of(encoder)
    (text,) = check_words([text])
    ids = encoder.tokenizer.encode(text)
    result = np.zeros(len(ids), dtype=np.float32)
    for start in range(0, len(ids), BATCH_ROWS):
        places = range(start, min(start + BATCH_ROWS, len(ids)))
        targets_M = torch.tensor([ids[place] for place in places], device=encoder.device)
        logits_MV = model.logits(states_at(encoder, ids, places, mask_id))
        result[start : places.stop] = -F.cross_entropy(logits_MV, targets_M, reduction="none").cpu().numpy()
    return result


def states_at(encoder: TextEncoder, ids: list[int], places: Sequence[int], mask_id: int | None = None) -> Tensor:
    """Hidden states at some places of a text, ``[M, D]``; the place itself becomes ``mask_id`` if that is given.

    A text longer than a row is read in the window round each place.
    """
    room = encoder.max_length - encoder.wrapping.overhead()
    rows, inner = [], []
    for place in places:
        start = max(0, min(place - room // 2, len(ids) - room))
        window = ids[start : start + room]
        if mask_id is not None:
            window[place - start] = mask_id
        rows.append(encoder.wrapping.wrap(window))
        inner.append(place - start + rows[-1].starts[0])

    def read(states_MD: Tensor, lengths_B: Tensor, indices: list[int]) -> Tensor:
        at_B = torch.tensor([inner[index] for index in indices], device=states_MD.device)
        return states_MD[lengths_B.cumsum(0) - lengths_B + at_B]

    return torch.stack(encoder.reader.run(rows, read)).to(encoder.device)


def mask_of(encoder: TextEncoder) -> tuple[int, str]:
    """The mask's id and text.

    Raises:
        ModelError: the tokenizer has none.
    """
    for token, id in encoder.tokenizer.special_tokens.items():
        if id == encoder.tokenizer.mask_id:
            return id, token
    raise ModelError(
        "the tokenizer has no mask token",
        where=encoder.name,
        fix="name it as mask_token in tokenizer_config.json",
        zh="分词器没有掩码符号，请在 tokenizer_config.json 中以 mask_token 指明",
    )
