"""Decoders of architectures that Hanmo does not have itself, run by ``transformers`` if that is installed.

They write and score as every other model does; they are slower here and cannot be trained or exported by Hanmo. Nothing
of the folder is executed: code of its own is refused, and so are pickles and settings that name code.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hanmo.errors import ModelError, missing_package
from hanmo.inference.batch import pad_left
from hanmo.inference.networks import LOGIT_VALUES, SCORE_TOKENS, Decoding
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


class ForeignNetwork:
    """A causal language model of ``transformers`` in the engine's form."""

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        self.vocab_size = int(model.get_input_embeddings().num_embeddings)
        self.context_length = int(getattr(model.config, "max_position_embeddings", None) or FOREIGN_CONTEXT)
        self.takes = set(inspect.signature(model.forward).parameters)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device  # type: ignore[no-any-return]

    def room(self, prompt: int) -> int:
        return self.context_length - prompt

    def row_bytes(self, columns: int) -> int:
        config = self.model.config
        layers, width = getattr(config, "num_hidden_layers", 32), getattr(config, "hidden_size", 4096)
        return int(2 * layers * width * columns * next(self.model.parameters()).element_size())

    def begin(self, prompts: Sequence[Sequence[int]], room: int) -> Decoding:
        return ForeignDecoding(self, prompts, room)

    def forward(self, ids_BT: Tensor, mask_BS: Tensor | None, cache: Any = None, last_only: bool = False) -> Any:
        """The output of ``transformers`` for the last T of S columns."""
        options: dict[str, Any] = {}
        if mask_BS is not None:
            options["attention_mask"] = mask_BS.long()
            if "position_ids" in self.takes:
                options["position_ids"] = (mask_BS.long().cumsum(1) - 1).clamp(min=0)[:, -ids_BT.size(1) :]
        if last_only and "logits_to_keep" in self.takes:
            options["logits_to_keep"] = 1
        return self.model(input_ids=ids_BT, past_key_values=cache, use_cache=cache is not None, **options)

    def score(self, ids_BT: Tensor) -> Tensor:
        """Some rows at a time."""
        B, T = ids_BT.shape
        rows = max(1, min(SCORE_TOKENS, LOGIT_VALUES // self.vocab_size) // T)
        scores = []
        for row in range(0, B, rows):
            part_BT = ids_BT[row : row + rows].to(self.device)
            logits_BTV = self.forward(part_BT[:, :-1], None).logits.float()
            scores.append(-F.cross_entropy(logits_BTV.transpose(1, 2), part_BT[:, 1:], reduction="none").cpu())
        return torch.cat(scores)


class ForeignDecoding:
    """Rows padded on the left over a cache of ``transformers``; a network without such a cache reads all again."""

    def __init__(self, network: ForeignNetwork, prompts: Sequence[Sequence[int]], room: int) -> None:
        self.network = network
        self.padding_id = network.vocab_size
        self.history_BS = pad_left(prompts, room, self.padding_id, network.device)
        self.length, self.read = max(len(ids) for ids in prompts), 0
        self.cache = self.new_cache()

    def new_cache(self) -> Any:
        """A cache whose rows can be chosen, for networks of attention only."""
        from transformers import DynamicCache

        standard = (
            getattr(self.network.model, "_supports_cache_class", True) and "past_key_values" in self.network.takes
        )
        stateful = getattr(self.network.model, "_is_stateful", False)  # recurrent states know nothing of padding
        return DynamicCache() if standard and not stateful else None

    @property
    def tokens_BS(self) -> Tensor:
        return self.history_BS[:, : self.length]

    def prefill(self) -> Tensor:
        ids_BS = self.tokens_BS
        mask_BS = ids_BS != self.padding_id
        start = self.read if self.cache is not None else 0
        padded = None if bool(mask_BS.all()) else mask_BS
        ids_BT = ids_BS.masked_fill(~mask_BS, 0)[:, start:]
        output = self.network.forward(ids_BT, padded, self.cache, last_only=True)
        self.read = self.length
        return output.logits[:, -1].float()  # type: ignore[no-any-return]

    def step(self, ids: Sequence[int]) -> Tensor:
        self.history_BS[:, self.length] = torch.tensor(ids, device=self.history_BS.device)
        self.length += 1
        return self.prefill()

    def select(self, rows: Sequence[int]) -> None:
        order = torch.tensor(rows, device=self.history_BS.device)
        self.history_BS = self.history_BS[order]
        if self.cache is not None:
            self.cache.batch_select_indices(order)
