"""The smallest real language model, for tests: Karpathy's stories260K (260 thousand parameters, on TinyStories).

``shared/data/stories260k`` holds it as llama2.c wrote it: weights in Meta's order, which is also GGUF's, and a
SentencePiece vocabulary with scores. Here it becomes a GGUF file and, from that, a model folder.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
from gguf import GGUFWriter, TokenType

FIRST_WORDS = (  # what the model is known to say, greedily, from nothing (its own README)
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball."
)


def read_vocabulary(path: Path) -> list[tuple[str, float]]:
    """Tokens and scores of a llama2.c tokenizer file."""
    data, position, tokens = path.read_bytes(), 4, []
    while position < len(data):
        score, length = struct.unpack_from("<fi", data, position)
        position += 8 + length
        tokens.append((data[position - length : position].decode(), score))
    return tokens


def build_gguf(shared: Path, target: Path) -> Path:
    """Write stories260K as a GGUF file."""
    source = shared / "stories260k"
    raw = (source / "stories260K.bin").read_bytes()
    D, F, L, H, K, V, S = struct.unpack_from("<7i", raw)
    values, position = np.frombuffer(raw, np.float32, offset=28), 0

    def take(*shape: int) -> np.ndarray:
        nonlocal position
        start, position = position, position + int(np.prod(shape))
        return values[start:position].reshape(shape).copy()

    KV = K * D // H
    embedding = take(V, D)
    layers = {
        "attn_norm": take(L, D),
        "attn_q": take(L, D, D),
        "attn_k": take(L, KV, D),
        "attn_v": take(L, KV, D),
        "attn_output": take(L, D, D),
        "ffn_norm": take(L, D),
        "ffn_gate": take(L, F, D),
        "ffn_down": take(L, D, F),
        "ffn_up": take(L, F, D),
    }
    writer = GGUFWriter(target, "llama")
    writer.add_context_length(S)
    writer.add_embedding_length(D)
    writer.add_block_count(L)
    writer.add_feed_forward_length(F)
    writer.add_head_count(H)
    writer.add_head_count_kv(K)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("llama")
    vocabulary = read_vocabulary(source / "tok512.bin")
    tokens = ["<unk>", "<s>", "</s>", *(text.replace(" ", "▁") for text, _ in vocabulary[3:])]
    types = [TokenType.UNKNOWN, *[TokenType.CONTROL] * 2, *[TokenType.BYTE] * 256, *[TokenType.NORMAL] * (V - 259)]
    writer.add_token_list(tokens)
    writer.add_token_scores([score for _, score in vocabulary])
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_tensor("token_embd.weight", embedding)
    writer.add_tensor("output_norm.weight", take(D))
    for name, stacked in layers.items():
        for index in range(L):
            writer.add_tensor(f"blk.{index}.{name}.weight", stacked[index])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def build_folder(shared: Path, target: Path) -> Path:
    """Write stories260K as a model folder in the Hugging Face layout."""
    from hanmo.models.checkpoints.gguf import load_gguf
    from hanmo.models.checkpoints.save import save_folder
    from hanmo.models.transformer import build

    file = build_gguf(shared, target.with_suffix(".gguf"))
    loaded = load_gguf(file)
    file.unlink()
    model = build(loaded.config, loaded.state)
    save_folder(target, model, loaded.tokenizer, provenance={"name": "stories260K"}, generation=loaded.generation)
    return target
