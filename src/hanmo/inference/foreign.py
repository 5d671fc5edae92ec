"""Decoders of architectures that Hanmo does not have itself, run by ``transformers`` if that is installed.

They write and score as every other model does; they are slower here and cannot be trained or exported by Hanmo. Nothing
of the folder is executed: code of its own is refused, and so are pickles and settings that name code.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hanmo.errors import ModelError, missing_package
from hanmo.inference.decoders import CACHE_BYTES, PREFILL_TOKENS
from hanmo.inference.networks import LOGIT_VALUES, SCORE_TOKENS, Piece, TokenText
from hanmo.language import pick
from hanmo.models.architectures import known
from hanmo.models.checkpoints.huggingface import read_object, weight_files
from hanmo.settings import notice

FOREIGN_CONTEXT = 4096  # where the network has no limit of its own: all logits of a row are held when it is scored


def load_foreign(folder: Path, device: torch.device, *, name: str) -> ForeignNetwork:
    """Read a model folder through ``transformers``.

    Raises:
        ModelError: an architecture that it does not know either, code in the folder, or weights it cannot read.
        ResourceError: ``transformers`` is not installed.
    """
    raw, where = read_object(folder / "config.json"), str(folder / "config.json")
    kind = raw.get("model_type")
    if importlib.util.find_spec("transformers") is None:
        error = missing_package("transformers", "", f"the architecture '{kind}'")
        raise type(error)(
            f"the architecture '{kind}' is not one of Hanmo's own",
            where=where,
            why="other architectures run through the package 'transformers', which is not installed",
            fix=f"pip install transformers; or take one of: {known()}",
            zh=f"Hanmo 自身不支持结构 '{kind}'；可安装 transformers 后使用，或改用：{known()}",
        )
    hidden = sorted(key for key in raw if key.startswith("_") and key != "_name_or_path")
    if hidden or "auto_map" in raw:
        raise ModelError(
            f"the configuration names code to be run ('{[*hidden, 'auto_map'][0]}')",
            where=where,
            why="a model folder is data; Hanmo never runs code that comes with one",
            fix="use a model of an architecture that is part of transformers itself",
            zh="配置要求运行外部代码，已拒绝。请使用 transformers 自带结构的模型",
        )
    weight_files(folder)  # refuses pickles, links and paths that lead out of the folder
    import transformers

    try:
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype="auto"
        )
    except (ValueError, KeyError, OSError, RuntimeError, AttributeError, TypeError, ImportError) as error:
        raise ModelError(
            f"neither Hanmo nor transformers {transformers.__version__} can load the architecture '{kind}' as a "
            f"language model: {str(error).splitlines()[0][:200]}",
            where=where,
            fix=f"Hanmo's own architectures: {known()}",
            zh=f"Hanmo 与 transformers {transformers.__version__} 都无法加载结构 '{kind}'。Hanmo 自身支持：{known()}",
        ) from None
    runner = f"transformers {transformers.__version__}"
    notice(
        pick(
            f"{name}: the architecture '{kind}' is not one of Hanmo's own; {runner} runs it",
            f"{name}：结构 '{kind}' 不是 Hanmo 自身的结构，由 {runner} 运行",
        )
    )
    dtype = torch.float32 if device.type == "cpu" else model.dtype
    return ForeignNetwork(model.to(device=device, dtype=dtype))


class ForeignText(TokenText):
    """A text and, for networks of attention, its cache of ``transformers``."""

    def __init__(self, ids: Iterable[int] = (), cache: Any = None) -> None:
        super().__init__(ids)
        self.cache = cache

    def fork(self) -> ForeignText:
        return ForeignText(self.ids, copy.deepcopy(self.cache))

    def release(self) -> None:
        super().release()
        self.cache = None


class ForeignNetwork:
    """A causal language model of ``transformers`` in the engine's form; texts are read one by one."""

    piece, trims, keeps = PREFILL_TOKENS, False, 0

    def __init__(self, model: Any) -> None:
        import transformers

        self.model = model.eval()
        self.vocab_size = int(model.get_input_embeddings().num_embeddings)
        self.context_length = int(getattr(model.config, "max_position_embeddings", None) or FOREIGN_CONTEXT)
        self.takes = set(inspect.signature(model.forward).parameters)
        self.runner = f"transformers {transformers.__version__}"

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device  # type: ignore[no-any-return]

    def describe(self) -> str:
        return f"{self.runner} on {self.device}"

    def room(self, prompt: int) -> int:
        return self.context_length - prompt

    def fits(self, lengths: Sequence[int]) -> bool:
        config = self.model.config
        layers, width = getattr(config, "num_hidden_layers", 32), getattr(config, "hidden_size", 4096)
        numbers = int(2 * layers * width * sum(lengths))
        return bool(numbers * next(self.model.parameters()).element_size() <= CACHE_BYTES)

    def open(self, prompt: Sequence[int], room: int, adapter: str | None) -> tuple[ForeignText, list[int]]:  # noqa: ARG002
        return ForeignText(cache=self.new_cache()), list(prompt)

    def new_cache(self) -> Any:
        """A cache that can be copied; None for networks whose states are of another kind: they read all again."""
        from transformers import DynamicCache

        standard = getattr(self.model, "_supports_cache_class", True) and "past_key_values" in self.takes
        return DynamicCache() if standard and not getattr(self.model, "_is_stateful", False) else None

    def read(self, pieces: Sequence[Piece]) -> Tensor:
        return torch.cat([self.read_one(piece) for piece in pieces])

    def read_one(self, piece: Piece) -> Tensor:
        """The wanted logits of one piece."""
        text: ForeignText = piece.text
        text.ids += piece.ids
        if text.cache is None and not piece.wanted:
            return torch.empty(0, self.vocab_size)
        ids = piece.ids if text.cache is not None else text.ids
        ids_1T = torch.tensor([list(ids)], device=self.device)
        logits_1TV = self.forward(ids_1T, text.cache, last_only=piece.wanted <= 1).logits
        return logits_1TV[0, logits_1TV.size(1) - piece.wanted :].float()  # type: ignore[no-any-return]

    def forward(self, ids_BT: Tensor, cache: Any = None, last_only: bool = False) -> Any:
        """The output of ``transformers``."""
        options = {"logits_to_keep": 1} if last_only and "logits_to_keep" in self.takes else {}
        return self.model(input_ids=ids_BT, past_key_values=cache, use_cache=cache is not None, **options)

    def score(self, ids_BT: Tensor) -> Tensor:
        """Some rows at a time."""
        B, T = ids_BT.shape
        rows = max(1, min(SCORE_TOKENS, LOGIT_VALUES // self.vocab_size) // T)
        scores = []
        for row in range(0, B, rows):
            part_BT = ids_BT[row : row + rows].to(self.device)
            logits_BTV = self.forward(part_BT[:, :-1]).logits.float()
            scores.append(-F.cross_entropy(logits_BTV.transpose(1, 2), part_BT[:, 1:], reduction="none").cpu())
        return torch.cat(scores)
