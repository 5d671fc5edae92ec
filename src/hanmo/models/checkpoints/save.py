"""Write a model folder that ``transformers`` and every other reader of the Hugging Face layout loads unchanged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hanmo.folder import atomic_folder, write_json
from hanmo.models.architectures import hand_over, task_of, write_config
from hanmo.models.checkpoints.weights import known_ids, write_safetensors
from hanmo.models.cost import num_parameters
from hanmo.models.transformer import Transformer, TransformerConfig
from hanmo.progress import human_count
from hanmo.text.tokenizer import Tokenizer

MAX_SHARD_BYTES = 5_000_000_000
CARDS = {  # by task: what the model is, in English and Chinese, the hub's tag, and the method to call
    "causal-lm": ("A decoder language model", "解码器语言模型", "text-generation", "generate"),
    "seq2seq-lm": ("An encoder-decoder", "编码器—解码器模型", "text2text-generation", "generate"),
    "masked-lm": ("A masked language model", "掩码语言模型", "fill-mask", "fill"),
    "embedding": ("A text encoder", "文本编码器", "feature-extraction", "embed"),
    "sequence-classification": ("A text classifier", "文本分类器", "text-classification", "classify"),
    "token-classification": ("A sequence tagger", "序列标注器", "token-classification", "tag"),
    "span-extraction": ("A reader that finds answers", "抽取式阅读理解模型", "question-answering", "answer"),
}


def save_folder(
    target: Path,
    model: Transformer,
    tokenizer: Tokenizer,
    *,
    provenance: dict[str, Any],
    generation: dict[str, Any] | None = None,
    card: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write weights, configuration, tokenizer and model card to ``target``, completely or not at all.

    Args:
        target: the model folder; what stands there is replaced once the new one is whole.
        model: its weights are stored in their own precision; a tied output embedding is stored once.
        tokenizer: written beside the weights, with its chat template.
        provenance: settings, data fingerprint, metrics, ``prompt_prefix``...: the entries of ``hanmo.json``.
        generation: entries of ``generation_config.json`` that replace the defaults (greedy; the tokenizer's BOS, EOS
            and padding ids).
        card: the text of ``README.md``; a plain description by default.
        max_shard_bytes: larger weights are stored in several files with an index.

    Raises:
        ResourceError: the disk is full or cannot be written; an older folder at ``target`` is intact.
        ModelError: an id in ``generation`` lies outside the vocabulary.
    """
    generation = generation_entries(model.config, tokenizer, generation or {})
    special = {key: value for key, value in generation.items() if key.endswith("_token_id")}
    config = {**write_config(model.config), **special}
    config["torch_dtype"] = str(model.output_weight.dtype).removeprefix("torch.")
    with atomic_folder(Path(target), provenance) as folder:
        write_weights(folder, hand_over(model.config, model.state_dict()), max_shard_bytes)
        tokenizer.save(folder)
        write_json(folder / "config.json", config)
        write_json(folder / "generation_config.json", generation)
        text = card if card is not None else default_card(Path(target).name, model.config, provenance)
        (folder / "README.md").write_text(text, encoding="utf-8")


def write_weights(folder: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write ``model.safetensors``, or shards and the index that says which tensor is in which."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", shards[0])
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_safetensors(folder / file, shard)
        weight_map.update(dict.fromkeys(shard, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})


def generation_entries(config: TransformerConfig, tokenizer: Tokenizer, given: dict[str, Any]) -> dict[str, Any]:
    """The content of ``generation_config.json``; ids that do not exist are left out."""
    entries = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
        "do_sample": False,
        **given,
    }
    entries.pop("add_bos_token", None)  # a fact of the tokenizer that LoadedModel adds; not a key of this file
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = known_ids(entries[key], config.vocab_size, f"generation_config.json: {key}")
        entries[key] = ids[0] if len(ids) == 1 else (ids or None)
    return {key: value for key, value in entries.items() if value is not None}


def default_card(
    name: str, config: TransformerConfig, provenance: dict[str, Any], *, library: str = "transformers"
) -> str:
    """A model card that says what is known without being told: kind, size, context, and how to use it.

    Args:
        library: what reads the folder, for the hub.
    """
    licence = provenance.get("license", "unknown")
    languages = provenance.get("languages") or []
    header = [f"license: {licence}", *(["language:", *(f"- {code}" for code in languages)] if languages else [])]
    size = human_count(num_parameters(config))
    kind, kind_zh, tag, method = CARDS[task_of(config)]
    return "\n".join(
        [
            "---",
            *header,
            f"library_name: {library}",
            f"pipeline_tag: {tag}",
            "tags:",
            "- hanmo",
            f"- {tag}",
            "---",
            "",
            f"# {name}",
            "",
            f"{kind} with {size} parameters: {config.num_layers} layers of size {config.hidden_size}, "
            f"{config.num_heads} attention heads ({config.num_kv_heads} for keys and values), a vocabulary of "
            f"{config.vocab_size} tokens, and a context of {config.max_position_embeddings} tokens.",
            "",
            "Settings, data fingerprint and metrics are in `hanmo.json`.",
            "",
            "```",
            *([f"hanmo generate path/to/{name} '...'"] if method == "generate" else []),
            f"python -c \"import hanmo; print(hanmo.load('path/to/{name}').{method}(['...']))\"",
            "```",
            "",
            "## Limits",
            "",
            "The model writes or judges text in the manner of its training data. It states false things with "
            "confidence and may repeat personal or offensive content found there. Do not rely on it for decisions "
            "about people.",
            "",
            "## 简介",
            "",
            f"这是一个{kind_zh}，约 {size} 参数，{config.num_layers} 层，词表 {config.vocab_size}，"
            f"上下文长度 {config.max_position_embeddings} 个词元。设置、数据指纹与评测结果见 `hanmo.json`。"
            "模型只是按训练数据的样子续写或判断文本：内容可能失实，也可能带有训练数据中的个人信息或冒犯性内容，请勿用于对人的决策。",
            "",
        ]
    )
