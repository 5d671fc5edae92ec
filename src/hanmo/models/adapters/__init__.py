"""Training a part of a network: low-rank adapters in PEFT's file format, and freezing all but some layers."""

from hanmo.models.adapters.attach import (
    adapter_config,
    adapter_names,
    adapter_parameters,
    adapters_off,
    add_adapter,
    base_state,
    merge,
    remove_adapter,
    set_active,
    train_adapter,
)
from hanmo.models.adapters.choice import train_only, trainable_parameters, weights_fingerprint
from hanmo.models.adapters.files import LoadedAdapter, load_adapter, save_adapter
from hanmo.models.adapters.lora import Adapter, LoraConfig, LoraLinear, SavedModule

__all__ = [
    "Adapter",
    "LoadedAdapter",
    "LoraConfig",
    "LoraLinear",
    "SavedModule",
    "adapter_config",
    "adapter_names",
    "adapter_parameters",
    "adapters_off",
    "add_adapter",
    "base_state",
    "load_adapter",
    "merge",
    "remove_adapter",
    "save_adapter",
    "set_active",
    "train_adapter",
    "train_only",
    "trainable_parameters",
    "weights_fingerprint",
]
