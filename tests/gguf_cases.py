"""GGUF files made by llama.cpp's own Python package, and ways to damage them."""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize
from numpy.typing import NDArray

from hanmo.models.checkpoints.gguf_names import LAYER_NAMES, TOP_NAMES
from hanmo.models.transformer import Transformer, TransformerConfig

TEXTS = [
    "Hello world, it's 2024-10-31!\n\n  def f(x):\n\treturn x**2 + 3.14159",
    "从前有座山，山里有座庙。２０２４年，庙里有３个和尚。",
    "I'll we've DON'T café naïve ½ ١٢٣ 🎉👨‍👩‍👧  \n \n   end  ",
    "<|im_start|>user\nhi<|im_end|>",
]


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the query and key weights of the llama architecture."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def bpe(pre: str) -> tokenizers.Tokenizer:
    """A small byte-level BPE whose splitting rule is written as its model's own tokenizer.json writes it."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    cl100k = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}@| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    with_pattern = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    tokenizer.pre_tokenizer = {
        "gpt-2": with_pattern,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), with_pattern]),
        "llama-bpe": pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(cl100k.replace("@", "{1,3}")), "isolated"), bytes_only]
        ),
        "qwen2": pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(cl100k.replace("@", "")), "isolated"), bytes_only]
        ),
    }[pre]
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 2, trainer)
    return tokenizer


def write_tokenizer(writer: GGUFWriter, tokenizer: tokenizers.Tokenizer, pre: str | None) -> None:
    """Put a byte-level BPE into a GGUF file as llama.cpp's converter does."""
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    special = [TokenType.CONTROL] * 3
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([*special, *[TokenType.NORMAL] * (len(tokens) - 3)])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")


CONFIG = TransformerConfig(400, 64, 2, 4, 2, 16, 96, 128, rope_theta=50_000.0)
Encoded = tuple[NDArray[Any], GGMLQuantizationType]


def as_type(kind: GGMLQuantizationType) -> Callable[[str, NDArray[np.float32]], Encoded]:
    """Matrices rounded to one type by the reference's quantisers."""
    return lambda _, values: (quantize(values, kind), kind)


def as_it_is(_: str, values: NDArray[np.float32]) -> Encoded:
    """Matrices in float32."""
    return values, GGMLQuantizationType.F32


def write_model(
    target: Path,
    model: Transformer,
    *,
    pre: str | None = "smollm",
    encode: Callable[[str, NDArray[np.float32]], Encoded] = as_it_is,
    change: Callable[[GGUFWriter], Any] = lambda _: None,
) -> Path:
    """Write a model as llama.cpp's converter would.

    Args:
        encode: gives the bytes and the type of a matrix, by its name in the file.
    """
    config = model.config
    architecture = config.model_type
    writer = GGUFWriter(target, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    if architecture == "gpt2":
        writer.add_layer_norm_eps(config.norm_eps)
    else:
        writer.add_head_count_kv(config.num_kv_heads)
        writer.add_key_length(config.head_dim)
        writer.add_layer_norm_rms_eps(config.norm_eps)
        writer.add_rope_freq_base(config.rope_theta)
    write_tokenizer(writer, bpe(pre or "gpt-2"), pre)
    for name, values in gguf_tensors(model):
        if values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            stored, kind = encode(name, values)
            writer.add_tensor(name, stored, raw_dtype=kind)
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def gguf_tensors(model: Transformer) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """The weights of a network under llama.cpp's names and in its order of rows."""
    config, state = model.config, model.state_dict()
    back = {value: key for key, value in LAYER_NAMES.items()}
    top = {value: key for key, value in TOP_NAMES.items()}
    for name, tensor in state.items():
        values = tensor.numpy()
        if name in top:
            yield top[name], values
            continue
        _, _, layer, *middle, suffix = name.split(".")
        if config.model_type == "gpt2" and middle[-1] in ("k_proj", "v_proj"):
            continue
        if config.model_type == "gpt2" and middle[-1] == "q_proj":
            parts = [state[name.replace("q_proj", f"{letter}_proj")].numpy() for letter in "qkv"]
            yield f"blk.{layer}.attn_qkv.{suffix}", np.concatenate(parts)
            continue
        if config.model_type == "llama" and middle[-1] in ("q_proj", "k_proj"):
            values = permute(values, config.num_heads if middle[-1] == "q_proj" else config.num_kv_heads)
        yield f"blk.{layer}.{back['.'.join(middle)]}.{suffix}", values


def random_model(**changes: Any) -> Transformer:
    """A small model with random weights everywhere."""
    model = Transformer(dataclasses.replace(CONFIG, **changes))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model.eval()


def field(data: bytes, key: str) -> int:
    """Where the type of a metadata entry begins."""
    needle = struct.pack("<Q", len(key)) + key.encode()
    return data.index(needle) + len(needle)


def described(data: bytes, name: str) -> int:
    """Where the number of dimensions of a tensor description begins."""
    return field(data, name)


def put(data: bytes, position: int, code: str, *values: Any) -> bytes:
    """Replace bytes at a position."""
    packed = struct.pack(code, *values)
    return data[:position] + packed + data[position + len(packed) :]


def second(data: bytes) -> int:
    """The description of the output norm: 1 dimension, so type at +12 and offset at +16."""
    return described(data, "output_norm.weight")


EMBEDDING = "token_embd.weight"  # 2 dimensions: sizes at +4 and +12, type at +20, offset at +24
HUGE = 0xFFFF_FFFF_FFFF_FFF0
HOSTILE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "three bytes": lambda d: d[:3],
    "magic only": lambda d: d[:4],
    "header cut before the counts": lambda d: d[:10],
    "wrong magic": lambda d: b"GGML" + d[4:],
    "a web page": lambda _: b"<!DOCTYPE html><html>" + b" " * 100,
    "a git lfs pointer": lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "version 1": lambda d: put(d, 4, "<I", 1),
    "version 99": lambda d: put(d, 4, "<I", 99),
    "big-endian": lambda d: put(d, 4, ">I", 3),
    "2**64 tensors": lambda d: put(d, 8, "<Q", HUGE),
    "one tensor more than described": lambda d: put(d, 8, "<Q", struct.unpack_from("<Q", d, 8)[0] + 1),
    "2**64 metadata entries": lambda d: put(d, 16, "<Q", HUGE),
    "one entry more than there is": lambda d: put(d, 16, "<Q", struct.unpack_from("<Q", d, 16)[0] + 1),
    "one entry less than there is": lambda d: put(d, 16, "<Q", struct.unpack_from("<Q", d, 16)[0] - 1),
    "first key of 2**64 bytes": lambda d: put(d, 24, "<Q", HUGE),
    "first key of 2**40 bytes": lambda d: put(d, 24, "<Q", 1 << 40),
    "key that is not UTF-8": lambda d: put(d, 32, "<B", 0xFF),
    "key twice": lambda d: d.replace(b"tokenizer.ggml.bos_token_id", b"tokenizer.ggml.eos_token_id"),
    "unknown metadata type": lambda d: put(d, field(d, "llama.context_length"), "<I", 99),
    "string of 2**64 bytes": lambda d: put(d, field(d, "general.architecture") + 4, "<Q", HUGE),
    "array of 2**64 strings": lambda d: put(d, field(d, "tokenizer.ggml.tokens") + 8, "<Q", HUGE),
    "array of 2**62 numbers": lambda d: put(d, field(d, "tokenizer.ggml.token_type") + 8, "<Q", 1 << 62),
    "array longer than the file": lambda d: put(d, field(d, "tokenizer.ggml.token_type") + 8, "<Q", len(d)),
    "array of arrays": lambda d: put(d, field(d, "tokenizer.ggml.tokens") + 4, "<I", 9),
    "array of an unknown type": lambda d: put(d, field(d, "tokenizer.ggml.tokens") + 4, "<I", 77),
    "more token types than tokens": lambda d: put(  # the same bytes, read as twice as many 16-bit numbers
        d, start := field(d, "tokenizer.ggml.token_type") + 4, "<IQ", 3, 2 * struct.unpack_from("<Q", d, start + 4)[0]
    ),
    "no dimensions": lambda d: put(d, described(d, EMBEDDING), "<I", 0),
    "five dimensions": lambda d: put(d, described(d, EMBEDDING), "<I", 5),
    "2**32 dimensions": lambda d: put(d, described(d, EMBEDDING), "<I", 0xFFFFFFFF),
    "dimension of zero": lambda d: put(d, described(d, EMBEDDING) + 4, "<Q", 0),
    "dimensions whose product overflows 64 bits": lambda d: put(
        d, described(d, EMBEDDING) + 4, "<2Q", 1 << 33, 1 << 33
    ),
    "dimensions larger than the data": lambda d: put(d, described(d, EMBEDDING) + 12, "<Q", 1 << 40),
    "unknown tensor type": lambda d: put(d, described(d, EMBEDDING) + 20, "<I", 999),
    "type that is not supported": lambda d: put(d, described(d, EMBEDDING) + 20, "<I", 10),
    "rows that are no whole blocks": lambda d: put(put(d, second(d) + 12, "<I", 8), second(d) + 4, "<Q", 33),
    "offset beyond the file": lambda d: put(d, second(d) + 16, "<Q", 1 << 50),
    "offset that wraps round": lambda d: put(d, second(d) + 16, "<Q", HUGE),
    "tensors that overlap": lambda d: put(d, second(d) + 16, "<Q", 0),
    "offset that is not aligned": lambda d: put(d, second(d) + 16, "<Q", 3),
    "a gap between tensors": lambda d: put(
        d, second(d) + 16, "<Q", struct.unpack_from("<Q", d, second(d) + 16)[0] + 32
    ),
    "tensor twice": lambda d: d.replace(b"blk.1.attn_q.weight", b"blk.0.attn_q.weight"),
    "unknown tensor name": lambda d: d.replace(b"blk.1.attn_q.weight", b"blk.1.attn_x.weight"),
    "end of the data missing": lambda d: d[:-100],
    "half of the file missing": lambda d: d[: len(d) // 2],
    "data missing": lambda d: d[: len(d) - 250_000],
    "BOS outside the vocabulary": lambda d: put(d, field(d, "tokenizer.ggml.bos_token_id") + 4, "<I", 70_000),
    "no heads": lambda d: put(d, field(d, "llama.attention.head_count") + 4, "<I", 0),
    "heads that do not divide": lambda d: put(d, field(d, "llama.attention.head_count_kv") + 4, "<I", 3),
    "context of zero": lambda d: put(d, field(d, "llama.context_length") + 4, "<I", 0),
    "rotary base of zero": lambda d: put(d, field(d, "llama.rope.freq_base") + 4, "<f", 0.0),
    "rotary base that is not a number": lambda d: put(d, field(d, "llama.rope.freq_base") + 4, "<f", float("nan")),
    "merge of unknown tokens": lambda d: d.replace("Ġ d".encode(), "Ġ\0d".encode()),
    "another tokenizer kind": lambda d: d.replace(b"gpt2", b"rwkv"),
}
