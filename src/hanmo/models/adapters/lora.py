"""Low-rank adapters: a frozen linear layer and a few small matrices beside it.

LoRA (Hu et al. 2021) adds ``scale * B A x`` to the product ``W x`` of a layer, A being [rank, in] and B [out, rank].
The scale is alpha / rank, or alpha / sqrt(rank) where ranks are large (rsLoRA, Kalajdzievski 2023). DoRA (Liu et al.
2024) also learns the length m of every row: ``m * (W + scale * B A) x / ||W + scale * B A||``, the norm of each row
taken as a constant by the gradient (their section 4.3).

One layer holds any number of adapters, each under its name; those that are active add up.
"""

from __future__ import annotations

import copy
import hashlib
import math
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hanmo.errors import UsageError

ALL_LINEAR = "all-linear"
GROUPS = {  # names for many layers at once: what the name of a layer inside a block holds
    ALL_LINEAR: (".layers.",),
    "attention": (".self_attn.", ".cross_attn."),
    "mlp": (".mlp.",),
}


@dataclass(frozen=True)
class LoraConfig:
    """What an adapter adds and where.

    Args:
        rank: columns of B; 8 to 64 are usual. The file grows in proportion.
        alpha: the change is multiplied by alpha / rank, so a changed rank needs no other learning rate.
        dropout: of the input of A, in training.
        targets: layers that get an adapter: names of our modules, endings of them ("q_proj", "self_attn.q_proj"), or a
            group: "all-linear" (every linear layer inside the blocks, the default), "attention", "mlp".
        rslora: divide alpha by the square root of the rank.
        dora: learn the length of every row as well.
        modules_to_save: modules trained fully beside it, a copy for each adapter: names or endings of them, such as
            "head" or "embed_tokens". Layers inside them get no low-rank matrices.

    Raises:
        UsageError: a value that no adapter can have.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str | tuple[str, ...] | None = None
    rslora: bool = False
    dora: bool = False
    modules_to_save: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise wrong("rank", self.rank, "a whole number from 1 on", "至少为 1 的整数")
        if type(self.alpha) not in (int, float) or not 0 < self.alpha < math.inf:
            raise wrong("alpha", self.alpha, "a number above 0", "大于 0 的数")
        if type(self.dropout) not in (int, float) or not 0 <= self.dropout < 1:
            raise wrong("dropout", self.dropout, "a number from 0 to below 1", "0 以上、小于 1 的数")
        for field in ("targets", "modules_to_save"):
            names = getattr(self, field)
            names = (names,) if isinstance(names, str) else tuple(names or ())
            if any(not isinstance(name, str) or not name for name in names) or (field == "targets" and names == ()):
                if self.targets is None and field == "targets":
                    continue
                raise wrong(field, getattr(self, field), "a list of module names", "模块名的列表")
            object.__setattr__(self, field, names)
        for field in ("rslora", "dora"):
            if type(getattr(self, field)) is not bool:
                raise wrong(field, getattr(self, field), "true or false", "true 或 false")

    def scale(self, rank: int, alpha: float) -> float:
        """What the product of B and A is multiplied by."""
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def wrong(field: str, value: object, expected: str, expected_zh: str) -> UsageError:
    """The error for a field of a configuration."""
    return UsageError(
        f"{field} of an adapter is {expected}, not {value!r}",
        where=f"lora.{field}",
        fix=f"set {field} to {expected}",
        zh=f"适配器的 {field} 应为{expected_zh}，而不是 {value!r}",
    )


def seed_of(seed: int, name: str) -> int:
    """A seed for one module that does not depend on which other modules there are."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1


def add_product(y: Tensor, low: Tensor, b: Tensor) -> Tensor:
    """``y + low @ b.T`` in one pass over y, which is much larger than both."""
    return torch.addmm(y.flatten(0, -2), low.flatten(0, -2), b.t()).view(y.shape) if y.dim() > 1 else y + low @ b.t()


class Adapter(nn.Module):
    """The matrices of one adapter in one layer.

    They are kept in float32 at least, whatever the layer is stored in: steps of training are smaller than what
    bfloat16 can tell apart.

    Args:
        base: the layer.
        config: dropout and the kind of scale.
        rank: r of this layer.
        alpha: of this layer.
        seed: of A, which is drawn as ``nn.Linear`` draws its weights; B is zero, so a new adapter changes nothing.
    """

    def __init__(self, base: nn.Linear, config: LoraConfig, rank: int, alpha: float, seed: int) -> None:
        super().__init__()
        self.config, self.rank, self.alpha = config, rank, alpha
        self.scale = config.scale(rank, alpha)
        weight = base.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        bound = base.in_features**-0.5  # Kaiming's with a = sqrt(5)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.rand(rank, base.in_features, generator=generator) * (2 * bound) - bound
        self.lora_A = nn.Parameter(drawn.to(weight.device, dtype))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=weight.device, dtype=dtype))
        if config.dora:
            self.magnitude: nn.Parameter | None = nn.Parameter(weight.detach().to(dtype).norm(dim=1))
        else:
            self.register_parameter("magnitude", None)

    def product(self) -> Tensor:
        """The low-rank matrix, ``[out, in]``."""
        return (self.lora_B * self.scale) @ self.lora_A

    def gain(self, base: nn.Linear) -> Tensor:
        """DoRA's factor of each row, ``[out]``: its learned length over the length it would have."""
        assert self.magnitude is not None
        with torch.no_grad():
            length = torch.addmm(base.weight.to(self.lora_A.dtype), self.lora_B * self.scale, self.lora_A).norm(dim=1)
            length.clamp_(min=torch.finfo(length.dtype).tiny)  # a row of zeros stays one
        gain: Tensor = self.magnitude / length
        return gain

    def forward(self, x: Tensor, y: Tensor, plain: Tensor, base: nn.Linear, weight: float = 1.0) -> Tensor:
        """The outputs with this adapter, in its precision.

        Args:
            x: the input of the layer, ``[..., in]``.
            y: its outputs so far, ``[..., out]``, those of other adapters included.
            plain: the layer's own outputs.
            base: the layer.
            weight: of the change.
        """
        dtype = self.lora_A.dtype
        low = F.linear(F.dropout(x.to(dtype), self.config.dropout, self.training), self.lora_A)
        if self.magnitude is None:
            return add_product(y.to(dtype), low * (self.scale * weight), self.lora_B)
        gain, bias = self.gain(base), None if base.bias is None else base.bias.to(dtype)
        unbiased = plain.to(dtype) if bias is None else plain.to(dtype) - bias
        changed = add_product(unbiased, low * self.scale, self.lora_B) * gain
        if y is plain and weight == 1:
            return changed if bias is None else changed + bias
        return y.to(dtype) + (changed - unbiased) * weight

    def difference(self, base: nn.Linear) -> Tensor:
        """The change of the layer's weight that does the same, ``[out, in]``."""
        product = self.product()
        if self.magnitude is None:
            return product
        weight = base.weight.to(product.dtype)
        return self.gain(base).unsqueeze(1) * (weight + product) - weight


class LoraLinear(nn.Module):
    """A linear layer with adapters.

    Args:
        base: the layer; its product is computed by itself, so that a layer with a faster one keeps it.

    Attributes:
        adapters: by name.
        active: the names of those that count and the weight of each.

    >>> layer = LoraLinear(nn.Linear(4, 3))
    >>> layer.adapters["zh"] = Adapter(layer.base, LoraConfig(rank=2), 2, 4.0, seed=0)
    >>> layer.active = {"zh": 1.0}
    >>> torch.equal(layer(torch.ones(1, 4)), layer.base(torch.ones(1, 4)))
    True
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.active: dict[str, float] = {}

    def adapter(self, name: str) -> Adapter:
        """One adapter."""
        return cast("Adapter", self.adapters[name])

    def forward(self, x: Tensor) -> Tensor:
        y = plain = self.base(x)
        for name, weight in self.active.items():
            y = self.adapter(name)(x, y, plain, self.base, weight)
        return y.to(plain.dtype)  # type: ignore[no-any-return]

    @property
    def weight(self) -> Tensor:
        """The matrix with the active adapters in it, for code that multiplies by it (no dropout there)."""
        weight: Tensor = self.base.weight
        for name, factor in self.active.items():
            weight = weight + (self.adapter(name).difference(self.base) * factor).to(weight.dtype)
        return weight

    @property
    def bias(self) -> Tensor | None:
        """The layer's own."""
        return self.base.bias

    @property
    def in_features(self) -> int:
        """Columns of the matrix."""
        return self.base.in_features

    @property
    def out_features(self) -> int:
        """Rows of the matrix."""
        return self.base.out_features


class SavedModule(nn.Module):
    """A module of which adapters have copies of their own, trained fully; it looks like the one that is in use.

    Attributes:
        base: the module of the network.
        copies: by adapter.
        active: the adapter whose copy is in use; None: the base.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.copies = nn.ModuleDict()
        self.active: str | None = None

    def add(self, name: str) -> None:
        """Make a copy for an adapter."""
        self.copies[name] = copy.deepcopy(self.base)

    @property
    def current(self) -> nn.Module:
        """The module in use."""
        return self.base if self.active is None else self.copies[self.active]

    def forward(self, *arguments: Any, **named: Any) -> Any:
        return self.current(*arguments, **named)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "base" not in self.__dict__.get("_modules", {}):  # while it is being made
                raise
            return getattr(self.current, name)
