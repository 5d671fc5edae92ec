"""Low-rank adapters in the form in which the native engine adds them: beside each joined product one pair of matrices.

Letters in names: R rank, N outputs, K inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from hanmo.errors import ModelError
from hanmo.inference.native.layout import GROUP, Packed, alternated, filled, pack_floats
from hanmo.models.adapters.attach import copies_of, layers_of
from hanmo.models.adapters.files import compare_names, read_adapter
from hanmo.models.transformer import Transformer, TransformerConfig

Changes = Mapping[str, tuple[Tensor, Tensor]]  # by the name of a linear layer: A [R, K] and B [N, R], scaled

JOINED = {  # the engine's products by the linear layers that are one there
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "output": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


def changes_of_folder(folder: str | Path, config: TransformerConfig, base: str = "") -> Changes:
    """Read an adapter folder of ours or PEFT's for a decoder. Its weights are not compared with those it was trained
    on, since these may be packed; only the names of the models are.

    Args:
        config: the decoder's shape.
        base: what it was loaded from; a notice says so if the adapter was made for another name.

    Raises:
        ModelError: it cannot be read, or adds more than low-rank matrices.
    """
    with torch.device("meta"):
        skeleton = Transformer(config)
    stored = read_adapter(folder, skeleton, base)
    compare_names(folder, stored.base, base)
    refuse_more(stored.config.dora, sorted(stored.saved), where=str(folder))
    changes = {}
    for layer, (alpha, tensors) in stored.layers.items():
        a, b = tensors["lora_A"].float(), tensors["lora_B"].float()
        changes[layer] = (a, b * stored.config.scale(a.size(0), alpha))
    return changes


def changes_of_network(model: Transformer, name: str) -> Changes:
    """One of the adapters that a network of torch holds.

    Raises:
        UsageError: there is none of that name.
        ModelError: it adds more than low-rank matrices.
    """
    adapters = layers_of(model, name)
    dora = any(adapter.magnitude is not None for adapter in adapters.values())
    refuse_more(dora, sorted(copies_of(model, name)), where=name)
    return {
        layer: (adapter.lora_A.detach().float(), (adapter.lora_B.detach() * adapter.scale).float())
        for layer, adapter in adapters.items()
    }


def refuse_more(dora: bool, saved: list[str], where: str) -> None:
    """Refuse what is not a product of two matrices beside a layer."""
    if dora:
        raise ModelError(
            "the native engine has no DoRA: the length of each row is not a low-rank change",
            where=where,
            fix="merge the adapter into its model (hanmo merge), or use engine='torch'",
            zh="本地引擎不支持 DoRA（行长度不是低秩改动），请先合并适配器，或用 engine='torch'",
        )
    if saved:
        raise ModelError(
            f"the adapter brings '{saved[0]}' whole, which cannot differ between the texts of one call",
            where=where,
            fix="merge the adapter into its model (hanmo merge), or use engine='torch'",
            zh=f"适配器自带完整的 '{saved[0]}'，同一批文本无法各用各的，请先合并，或用 engine='torch'",
        )


def joined_changes(config: TransformerConfig, changes: Changes) -> Iterator[tuple[int, int, Packed, Packed]]:
    """Layer, number of the product, A and B of all products that an adapter changes: the ranks of the parts of a
    product one above the other, B in blocks.

    Raises:
        ModelError: a layer that the engine does not change, or matrices of another size.
    """
    rows = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads, "v_proj": config.num_kv_heads}
    queries, intermediate = config.num_heads * config.head_dim, config.intermediate_size
    filled_intermediate = -(-intermediate // GROUP) * GROUP
    inputs = {"output": queries, "down": intermediate}
    left = dict(changes)
    for layer in range(config.num_layers):
        for number, (name, parts) in enumerate(JOINED.items()):
            found, column = [], 0
            parts = tuple(part for part in parts if config.gated or part != "mlp.gate_proj")
            for part in parts:
                outputs = rows[kind] * config.head_dim if (kind := part.rpartition(".")[2]) in rows else 0
                outputs = outputs or (intermediate if name == "gate_up" else config.hidden_size)
                full = f"model.layers.{layer}.{part}"
                a, b = left.pop(full, (torch.empty(0, inputs.get(name, config.hidden_size)), torch.empty(outputs, 0)))
                if a.shape != (b.size(1), inputs.get(name, config.hidden_size)) or b.size(0) != outputs:
                    raise ModelError(
                        f"the matrices {tuple(a.shape)} and {tuple(b.shape)} of an adapter do not fit '{full}'",
                        fix="load the model that the adapter was made for",
                        zh=f"适配器的矩阵 {tuple(a.shape)} 与 {tuple(b.shape)} 与 '{full}' 不符",
                    )
                found.append((a, b))
            rank = sum(a.size(0) for a, _ in found)
            if not rank:
                continue
            blocks = []
            for a, b in found:
                blocks.append(torch.nn.functional.pad(b, (column, rank - column - a.size(0))))
                column += a.size(0)
            if name == "gate_up":
                blocks = [filled(block, filled_intermediate) for block in blocks]
            b = alternated(blocks) if len(blocks) == 2 else torch.cat(blocks)
            yield layer, number, pack_floats(torch.cat([a for a, _ in found])), pack_floats(b)
    if left:
        raise ModelError(
            f"the adapter changes '{next(iter(left))}', which the native engine computes without adapters",
            fix="merge the adapter into its model (hanmo merge), or use engine='torch'",
            zh=f"适配器改动了 '{next(iter(left))}'，本地引擎不支持，请先合并，或用 engine='torch'",
        )
