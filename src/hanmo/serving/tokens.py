"""Texts as ids and back over HTTP, as vLLM does it: clients that score given texts (the lm-evaluation-harness with
``tokenizer_backend=remote``) must know where one token ends and the next begins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hanmo.serving.generation import check_ids
from hanmo.serving.schema import DetokenizeRequest, TokenizeRequest

if TYPE_CHECKING:
    from hanmo.inference.language_model import LanguageModel


def tokenizer_info(model: LanguageModel) -> dict[str, Any]:
    """The control tokens by their names in ``tokenizer_config.json``, the chat template, and sizes."""
    tokenizer = model.tokenizer
    names = {id: token for token, id in tokenizer.special_tokens.items()}
    roles = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    return {
        **{role: None if id is None else names.get(id) for role, id in roles.items()},
        "chat_template": tokenizer.chat_template,
        "vocab_size": tokenizer.vocab_size,
        "model_max_length": model.context_length,
    }


def tokenize(model: LanguageModel, request: TokenizeRequest) -> dict[str, Any]:
    """The ids of a text. Control tokens written in it are control tokens: who asks for ids may send any of them."""
    ids = model.tokenizer.encode(request.prompt, special=True)
    if request.add_special_tokens:
        ids = [*model.prompt_prefix, *ids, *model.prompt_suffix]
    answer: dict[str, Any] = {"count": len(ids), "max_model_len": model.context_length, "tokens": ids}
    if request.return_token_strs:
        answer["token_strs"] = [model.tokenizer.decode([id], skip_special=False) for id in ids]
    return answer


def detokenize(model: LanguageModel, request: DetokenizeRequest) -> dict[str, Any]:
    """The text of ids, control tokens included.

    Raises:
        ApiError: an id that no token has.
    """
    check_ids(request.tokens, model.tokenizer.vocab_size, "tokens")
    return {"prompt": model.tokenizer.decode(request.tokens, skip_special=False)}
