"""Adapters put on a network, switched, counted, folded into its weights and taken off."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from hanmo.errors import ModelError, UsageError, nearest
from hanmo.models.adapters.lora import ALL_LINEAR, GROUPS, Adapter, LoraConfig, LoraLinear, SavedModule, seed_of

NAME = re.compile(r"[\w-]+")
WRAPPING = re.compile(r"\.(base|adapters|copies)(\.|$)")  # what names of modules hold inside LoraLinear and SavedModule


def add_adapter(model: nn.Module, name: str, config: LoraConfig, seed: int = 0) -> int:
    """Give a network a new adapter, which changes nothing yet, and make it the only active and the only trained one.

    All other parameters are frozen.

    Args:
        name: letters (of any script), digits, "_" and "-".
        seed: of the matrices A; each depends on the seed and the name of its layer alone.

    Returns:
        The number of parameters to train.

    Raises:
        UsageError: a name that is taken or not usable, a target that is no linear layer, a module that does not exist.
    """
    saved = saved_modules(model, config.modules_to_save)
    targets = target_layers(model, config, saved)
    attach(model, name, config, dict.fromkeys(targets, (config.rank, config.alpha)), saved, seed)
    return sum(parameter.numel() for parameter in train_adapter(model, name).values())


def attach(
    model: nn.Module,
    name: str,
    config: LoraConfig,
    layers: Mapping[str, tuple[int, float]],
    saved: Iterable[str],
    seed: int,
) -> None:
    """Make the matrices of an adapter for ``layers``, with their rank and alpha, and copies of ``saved``; activate it.

    Raises:
        UsageError: the name is taken or not usable.
    """
    check_name(model, name)
    saved = list(saved)
    clash = next((ours for ours in saved for other in wrapped_within(model, ours)), None)
    if clash:
        raise UsageError(
            f"'{clash}' cannot be trained fully by '{name}': another adapter changed a part of it",
            fix="remove or merge the other adapter first",
            zh=f"模块 '{clash}' 已被另一个适配器改动，不能整体训练。请先移除或合并它",
        )
    for layer, (rank, alpha) in layers.items():
        module = model.get_submodule(layer)
        if not isinstance(module, LoraLinear):
            assert isinstance(module, nn.Linear)
            module = LoraLinear(module).train(module.training)
            replace(model, layer, module)
        adapter = Adapter(module.base, config, rank, alpha, seed_of(seed, layer))
        module.adapters[name] = adapter.train(module.training)
    for ours in saved:
        module = model.get_submodule(ours)
        if not isinstance(module, SavedModule):
            module = SavedModule(module).train(module.training)
            replace(model, ours, module)
        module.add(name)
    set_active(model, {name: 1.0})


def check_name(model: nn.Module, name: str) -> None:
    """Refuse a name that is taken or that no module can have."""
    taken = adapter_names(model)
    if name in taken:
        raise UsageError(
            f"the network has an adapter '{name}' already",
            fix="choose another name, or remove it first",
            zh=f"已有名为 '{name}' 的适配器，请换一个名称或先移除它",
        )
    if not is_name(name):
        raise UsageError(
            f"an adapter cannot be called '{name}'",
            fix="use letters, digits, '_' and '-', and no word that the program uses itself",
            zh=f"适配器不能叫 '{name}'，请只用文字、数字、_ 和 -",
        )


def is_name(name: str) -> bool:
    """Whether an adapter can be called so: torch refuses modules named like one of its own attributes."""
    return NAME.fullmatch(name) is not None and not hasattr(nn.ModuleDict(), name)


def wrapped_within(model: nn.Module, name: str) -> list[str]:
    """Modules inside (or around) a module that adapters changed already, the module itself left out if it is saved."""
    found = []
    for other, module in model.named_modules():
        if isinstance(module, LoraLinear) and f"{other}.".startswith(f"{name}."):
            found.append(other)
        inside = f"{other}.".startswith(f"{name}.") or f"{name}.".startswith(f"{other}.")
        if isinstance(module, SavedModule) and other != name and inside:
            found.append(other)
    return found


def target_layers(model: nn.Module, config: LoraConfig, saved: Iterable[str]) -> list[str]:
    """The linear layers that get an adapter, in the order of the network.

    Raises:
        UsageError: a target that no layer is called by.
    """
    inside = tuple(f"{name}." for name in saved)
    layers = [name for name in linear_layers(model) if not f"{name}.".startswith(inside or ("\0",))]
    wanted: set[str] = set()
    for target in (ALL_LINEAR,) if config.targets is None else config.targets:
        if target in GROUPS:
            found = [name for name in layers if any(part in f".{name}" for part in GROUPS[target])]
        else:
            found = [name for name in layers if ends_with(name, target)]
        if not found:
            raise unknown(model, target, layers)
        wanted.update(found)
    return [name for name in layers if name in wanted]


def unknown(model: nn.Module, target: str, layers: Iterable[str]) -> UsageError:
    """The error for a target that is no linear layer."""
    known = {*GROUPS, *(name.rpartition(".")[2] for name in layers)}
    others = [name for name, _ in model.named_modules() if ends_with(name, target)]
    why = f"'{others[0]}' is a {type(model.get_submodule(others[0])).__name__}, not a linear layer" if others else ""
    fix = "train it fully instead: modules_to_save" if others else nearest(target, known)
    fix_zh = "可用 modules_to_save 整体训练它" if others else nearest(target, known)
    return UsageError(
        f"no linear layer of this network is called '{target}'",
        where="lora.targets",
        why=why,
        fix=fix,
        zh=f"网络中没有名为 '{target}' 的线性层。{fix_zh}",
    )


def ends_with(name: str, ending: str) -> bool:
    """Whether a module is called so, or its name ends with these parts."""
    return f".{name}".endswith(f".{ending}")


def linear_layers(model: nn.Module) -> dict[str, nn.Linear | LoraLinear]:
    """Every linear layer of the network itself by its name, with adapters or without."""
    found: dict[str, nn.Linear | LoraLinear] = {}
    hidden: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear | SavedModule):
            hidden.append(f"{name}.")
        if isinstance(module, LoraLinear) or (isinstance(module, nn.Linear) and not name.startswith(tuple(hidden))):
            found[name] = module
    return found


def saved_modules(model: nn.Module, wanted: Iterable[str]) -> list[str]:
    """The modules that are trained fully, each once.

    Raises:
        UsageError: no module is called so, or it has no parameters.
    """
    modules = [
        name
        for name, module in model.named_modules()
        if name and not WRAPPING.search(name) and any(True for _ in module.parameters())
    ]
    found: list[str] = []
    for target in wanted:
        matches = [name for name in modules if ends_with(name, target)]
        if not matches:
            known = {name if "." not in name else name.rpartition(".")[2] for name in modules}
            raise UsageError(
                f"no module with weights is called '{target}' in this network",
                where="lora.modules_to_save",
                fix=nearest(target, {name for name in known if not name.isdigit()}),
                zh=f"网络中没有名为 '{target}' 且带权重的模块。{nearest(target, known)}",
            )
        found += [name for name in matches if name not in found]
    return [name for name in found if not any(f"{name}.".startswith(f"{other}.") for other in found if other != name)]


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of another."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def layers_of(model: nn.Module, name: str) -> dict[str, Adapter]:
    """The matrices of an adapter by the name of their layer.

    Raises:
        UsageError: there is no adapter of that name.
    """
    check_known(model, [name])
    modules = model.named_modules()
    return {at: m.adapter(name) for at, m in modules if isinstance(m, LoraLinear) and name in m.adapters}


def copies_of(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """The modules that an adapter trains fully, by the name of the module they stand for."""
    modules = model.named_modules()
    return {at: m.copies[name] for at, m in modules if isinstance(m, SavedModule) and name in m.copies}


def adapter_names(model: nn.Module) -> list[str]:
    """The adapters of a network, in the order in which they came."""
    names: dict[str, None] = {}
    for module in model.modules():
        if isinstance(module, LoraLinear):
            names.update(dict.fromkeys(module.adapters))
    return list(names)


def check_known(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse the name of an adapter that is not there."""
    known = adapter_names(model)
    for name in names:
        if name not in known:
            raise UsageError(
                f"the network has no adapter '{name}'" + ("" if known else "; it has none at all"),
                fix=nearest(name, known) if known else "load one, or add one",
                zh=f"网络没有名为 '{name}' 的适配器。" + (nearest(name, known) if known else "请先加载或添加"),
            )


def adapter_config(model: nn.Module, name: str) -> LoraConfig:
    """The configuration an adapter was made with."""
    return next(iter(layers_of(model, name).values())).config


def adapter_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The parameters of an adapter, and those of the modules it trains fully, by their name in the network."""
    check_known(model, [name])
    places = (f".adapters.{name}.", f".copies.{name}.")
    return {at: parameter for at, parameter in model.named_parameters() if any(place in at for place in places)}


def train_adapter(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Freeze everything but one adapter; returns its parameters."""
    parameters = adapter_parameters(model, name)
    model.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return parameters


def set_active(model: nn.Module, weights: Mapping[str, float]) -> None:
    """Choose which adapters count; the changes of several add up, each times its weight.

    Args:
        weights: by name; none: the network without adapters.

    Raises:
        UsageError: an unknown adapter, a weight that is no number, or two that both replace the same module.
    """
    check_known(model, weights)
    for name, weight in weights.items():
        if type(weight) not in (int, float) or not math.isfinite(weight):
            raise UsageError(f"the weight of the adapter '{name}' is a number, not {weight!r}")
    chosen: dict[SavedModule, str | None] = {}
    for at, module in model.named_modules():
        if isinstance(module, SavedModule):
            claims = [name for name in weights if name in module.copies]
            if len(claims) > 1:
                raise UsageError(
                    f"the adapters '{claims[0]}' and '{claims[1]}' both have their own '{at}': one can be used",
                    fix="activate one of them, or train adapters without modules_to_save",
                    zh=f"适配器 '{claims[0]}' 与 '{claims[1]}' 各有自己的 '{at}'，不能同时启用",
                )
            chosen[module] = claims[0] if claims else None
    for module, claim in chosen.items():
        module.active = claim
    for layer in model.modules():
        if isinstance(layer, LoraLinear):
            layer.active = {name: float(weight) for name, weight in weights.items() if name in layer.adapters}


def active_adapters(model: nn.Module) -> dict[str, float]:
    """The adapters that count, with their weights."""
    found: dict[str, float] = {}
    for layer in model.modules():
        if isinstance(layer, LoraLinear):
            found |= layer.active
    return found


@contextlib.contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The network as it was before any adapter, for as long as the block lasts: the reference of preference tuning."""
    before = active_adapters(model)
    set_active(model, {})
    try:
        yield
    finally:
        set_active(model, before)


def remove_adapter(model: nn.Module, name: str) -> None:
    """Take an adapter off; where it was the last, the network's own modules stand in their places again, frozen."""
    check_known(model, [name])
    set_active(model, {other: weight for other, weight in active_adapters(model).items() if other != name})
    for at, module in list(model.named_modules()):
        if isinstance(module, LoraLinear | SavedModule):
            held = module.adapters if isinstance(module, LoraLinear) else module.copies
            if name in held:
                del held[name]
            if not held:
                replace(model, at, module.base)


@torch.no_grad()
def merge(model: nn.Module, names: Iterable[str] | None = None) -> None:
    """Fold adapters into the weights; afterwards the network is a plain one, and computes what it did with them.

    Args:
        names: those to fold in, with the weight they are active with, 1 where they are not; default: the active ones.
            Adapters that are not named are dropped.

    Raises:
        UsageError: an unknown adapter, or there is none.
        ModelError: the result would hold NaN or infinite values; nothing was changed.
    """
    active = active_adapters(model)
    weights = active if names is None else {name: active.get(name, 1.0) for name in names}
    if not adapter_names(model):
        raise UsageError("the network has no adapter to merge", zh="网络没有可合并的适配器")
    set_active(model, weights)
    wrapped = [(at, m) for at, m in model.named_modules() if isinstance(m, LoraLinear | SavedModule)]
    merged = {}
    for at, layer in wrapped:
        if isinstance(layer, LoraLinear) and layer.active:
            merged[at] = total = folded(layer)
            if not total.isfinite().all():
                set_active(model, active)
                raise ModelError(f"the merged weights of '{at}' hold NaN or infinite values; nothing was merged")
    for at, module in wrapped:
        if isinstance(module, LoraLinear):
            if at in merged:
                module.base.weight.data = merged[at]
            replace(model, at, module.base)
        else:
            replace(model, at, module.current)


def folded(layer: LoraLinear) -> Tensor:
    """The matrix of a layer with its active adapters, summed in float64 and rounded once."""
    weight = layer.base.weight
    total = weight.double()
    for name, factor in layer.active.items():
        total += factor * layer.adapter(name).difference(layer.base).double()
    return total.to(weight.dtype)


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the network under the names they had without adapters, to be saved as a plain model."""
    state = {}
    for name, tensor in model.state_dict().items():
        owner, _, _ = name.partition(".adapters.")
        if ".adapters." in name and isinstance(model.get_submodule(owner), LoraLinear):
            continue
        state[name] = tensor
    for at, module in model.named_modules():
        if isinstance(module, LoraLinear | SavedModule):
            for name in [name for name in state if name.startswith(f"{at}.")]:
                tensor, rest = state.pop(name), name.removeprefix(f"{at}.")
                if rest.startswith("base."):
                    state[f"{at}.{rest.removeprefix('base.')}"] = tensor
    return state
