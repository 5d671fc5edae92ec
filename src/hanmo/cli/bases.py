"""The base of a fine-tuning: read, given the head and the tokens that its task needs, and what of it is trained."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hanmo.cli.finetune import NEW, FinetuneSettings
from hanmo.cli.fresh import new_base
from hanmo.cli.splits import Splits
from hanmo.errors import ModelError
from hanmo.language import pick
from hanmo.settings import notice

if TYPE_CHECKING:
    from hanmo.models.checkpoints.weights import LoadedModel
    from hanmo.models.transformer import Transformer
    from hanmo.text.tokenizer import Tokenizer

ADAPTER = "default"


@dataclass
class Base:
    """The model to begin with: where it lies, its parts, and the hash of its weights as they were stored."""

    path: Path
    loaded: LoadedModel
    model: Transformer
    tokenizer: Tokenizer
    fingerprint: str
    new_head: bool


def load_transformer(name: str, *, offline: bool) -> tuple[Path, LoadedModel]:
    """A transformer of any kind and where it lies.

    Raises:
        ModelError: it is a model of another kind.
    """
    import torch

    from hanmo.inference.loading import find
    from hanmo.models.architectures import ARCHITECTURES
    from hanmo.models.checkpoints.gguf import load_gguf
    from hanmo.models.checkpoints.huggingface import load_folder, read_object

    path = find(name, offline=offline)
    if path.is_file():
        return path, load_gguf(path)
    kind = read_object(path / "config.json").get("model_type")
    if kind not in ARCHITECTURES:
        raise ModelError(
            f"a model of the kind '{kind}' cannot be fine-tuned",
            where=name,
            fix="give a transformer: " + ", ".join(ARCHITECTURES),
            zh=f"'{kind}' 类模型不能微调，请给出 transformer 模型",
        )
    return path, load_folder(path, dtype=torch.float32)


def load_base(settings: FinetuneSettings, splits: Splits) -> Base:
    """The base model with the head and the tokens that the task needs."""
    from hanmo.cli.goals import make_head
    from hanmo.models.adapters import weights_fingerprint
    from hanmo.models.architectures import with_head
    from hanmo.models.transformer import Transformer
    from hanmo.text.chat_targets import with_chat_tokens
    from hanmo.training.objectives.instructions import widen

    if settings.base == NEW:
        path, loaded = new_base(settings, splits)
    else:
        path, loaded = load_transformer(settings.base, offline=settings.offline)
    config = loaded.config
    probe = Transformer.__new__(Transformer)  # only its configuration is asked for
    probe.__dict__["config"] = config
    head = make_head(settings, probe, splits.train)
    new_head = head is not None and (config.head is None or config.head.labels != head.labels)
    if head is not None and new_head:
        config = with_head(config, head)
        config.to_hf()  # what has no form on the disk is refused before the training
    elif head is None and settings.task == "embeddings":
        config = replace(config, lm=False, lm_bias=False, lm_transform=None, head=None)
    model = Transformer(config)
    model.initialize(settings.seed)
    own = model.state_dict()
    given = {
        name: value.float() for name, value in loaded.state.items() if name in own and own[name].shape == value.shape
    }
    missing = [name for name in own if name not in given and not name.startswith("head.")]
    if missing:
        raise ModelError(
            f"the base model lacks '{missing[0]}'",
            where=settings.base,
            zh=f"基础模型缺少 '{missing[0]}'",
        )
    model.load_state_dict({**own, **given})
    fingerprint = weights_fingerprint(model)
    tokenizer = loaded.tokenizer
    if settings.task in ("instructions", "preferences"):
        tokenizer, added = with_chat_tokens(tokenizer)
        if added:
            count = widen(model, tokenizer.vocab_size)
            notice(
                pick(
                    f"the base has no chat template: it gets that of ChatML and the tokens {', '.join(added)} "
                    f"({count} new rows of the embedding)",
                    f"基础模型没有对话模板：使用 ChatML，并加入符号 {'、'.join(added)}（词嵌入新增 {count} 行）",
                )
            )
    return Base(path, loaded, model, tokenizer, fingerprint, new_head)


def choose_weights(base: Base, settings: FinetuneSettings) -> int:
    """Decide what is trained: adapters, the last layers, or everything; returns the number of parameters."""
    from hanmo.models.adapters import LoraConfig, add_adapter, train_only

    if settings.lora:
        assert settings.rank is not None
        added = base.tokenizer.vocab_size > base.loaded.tokenizer.vocab_size
        whole = (*(("head",) if base.model.config.head else ()), *(("embed_tokens",) if added else ()))
        config = LoraConfig(
            settings.rank,
            settings.alpha,
            settings.lora_dropout,
            tuple(settings.targets) or None,
            settings.rslora,
            settings.dora,
            whole,
        )
        add_adapter(base.model, ADAPTER, config, settings.seed)
    elif settings.last_layers is not None:
        train_only(base.model, last_layers=settings.last_layers)
    return sum(p.numel() for p in base.model.parameters() if p.requires_grad)


def require_decoder(base: Base, settings: FinetuneSettings) -> None:
    """Conversations need a network that writes.

    Raises:
        ModelError: this one does not.
    """
    config = base.model.config
    if settings.task != "embeddings" and not (config.lm and config.causal and config.encoder is None):
        raise ModelError(
            f"--task {settings.task} needs a decoder, and this is a {config.model_type} of another kind",
            where=settings.base,
            fix="choose a decoder such as smollm2-135m-instruct, Llama or Qwen",
            zh=f"--task {settings.task} 需要解码器模型（如 smollm2-135m-instruct），而这是 {config.model_type}",
        )
