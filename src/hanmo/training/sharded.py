"""Several processes that divide the model among themselves: FSDP2 (Zhao et al. 2023), applied from outside.

Each process stores a part of the rows of every parameter, of its gradient and of its optimizer moments. The parameters
of a block are brought together for as long as it computes. Because every block is such a meeting, all processes must
run equally many micro-batches: those that have fewer repeat one, multiplied by zero.

Checkpoints: every process brings together and writes a share of the *whole* tensors, as files of the usual safetensors
layout (``model-00001-of-00004.safetensors``, ...), and hashes them; the first process adds state and manifest and
renames the folder. They load on any number of processes, also on one, and in any tool; torch.distributed.checkpoint
would store slices that only torch can read, with pickled metadata.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from hanmo.errors import HanmoError, ModelError, ResourceError
from hanmo.folder import (
    CANNOT_WRITE,
    MANIFEST,
    clear_leftovers,
    fsync_path,
    make_folder,
    replace_folder,
    sha256_file,
    write_json,
)
from hanmo.models.checkpoints.weights import write_safetensors
from hanmo.models.device import available_memory
from hanmo.models.transformer import Block
from hanmo.training.checkpoint import TrainingState, prune_checkpoints
from hanmo.training.distributed import Distributed
from hanmo.training.meeting import Place
from hanmo.training.objectives.base import Batch
from hanmo.training.optimizer import orthogonalize

METHODS = ("hidden", "loss", "encode", "logits", "target_logprobs")


class FullySharded(Distributed):
    """Every process has a part of the model, and a part of each step's micro-batches.

    Args:
        place: of this process.
        device: where it computes.
        precision: "bf16": compute in bfloat16 on GPUs; weights, their sums and the optimizer stay in float32.
        sparing: add up gradients after every micro-batch instead of once a step: more traffic, but no process ever
            holds the gradients of the whole model; None: where these would take a quarter of the free memory.
    """

    def __init__(
        self,
        place: Place,
        device: torch.device,
        *,
        precision: str = "fp32",
        sparing: bool | None = None,
    ) -> None:
        super().__init__(place, device)
        self.precision = precision
        self.wanted, self.sparing = sparing, bool(sparing)
        self.mesh = init_device_mesh(device.type, (place.count,))
        self.inside = False

    # The model --------------------------------------------------------------------------------------------------------

    def prepare(self, model: nn.Module) -> None:
        """Divide the model, block by block; what recomputes or compiles a block's forward pass was applied before.

        Raises:
            ModelError: a parameter is a single number, which cannot be divided.
        """
        self.give_weights(model)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 0:
                raise ModelError(
                    "a parameter that is a single number cannot be divided",
                    where=name,
                    fix="train without --shard",
                    zh="单个数值的参数无法切分；请不要使用 --shard",
                )
        if self.wanted is None:
            gradients = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
            sharing = 1 if self.device.type == "cuda" else self.place.local_count
            self.sparing = self.any(gradients * sharing > available_memory(self.device) / 4)
        half = self.precision == "bf16" and self.device.type == "cuda"
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if half else MixedPrecisionPolicy()
        self.model = model
        parts = [module for module in model.modules() if isinstance(module, Block)]
        for part in (*parts, model):
            fully_shard(part, mesh=self.mesh, mp_policy=policy)
            part.set_gradient_divide_factor(1.0)  # type: ignore[operator]  # sums, not means
            part.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]  # gloo has no scaled sum
        for name in ("forward", *METHODS):
            if hasattr(model, name):
                self.guard(model, name)

    def guard(self, model: nn.Module, name: str) -> None:
        """Bring the root's parameters together around a method that objectives call, but not again for those inside.

        Without gradients nothing would take them apart again, and they would be out of date after the next step.
        """
        plain = getattr(model, name)
        if name != "forward":  # which has hooks of its own
            register_fsdp_forward_method(model, name)
        hooked = getattr(model, name)

        def call(*arguments: Any, **named: Any) -> Any:
            if self.inside:
                return plain(*arguments, **named)
            self.inside = True
            try:
                return hooked(*arguments, **named)
            finally:
                self.inside = False
                if not torch.is_grad_enabled():
                    model.reshard()  # type: ignore[operator]

        setattr(model, name, call)

    # A step -----------------------------------------------------------------------------------------------------------

    def upcoming(self, batches: Iterator[Batch], spare: Callable[[], Batch]) -> Iterator[tuple[Batch, bool, bool]]:
        """As many micro-batches in every process: those that have fewer repeat one that does not count."""
        ahead = next(batches, None)
        more = self.any(ahead is not None)
        while more:
            batch, ahead = ahead, next(batches, None)
            more = self.any(ahead is not None)
            yield spare() if batch is None else batch, batch is not None, not more

    def begin_backward(self, last: bool) -> None:
        self.model.set_requires_gradient_sync(last or self.sparing)  # type: ignore[operator]

    def reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """The backward pass has added them already."""

    def clip(self, parameters: Iterable[nn.Parameter], limit: float) -> float:
        gradients = [local(p.grad) for p in parameters if p.grad is not None]
        squares = sum((g.float().square().sum(dtype=torch.float64) for g in gradients), torch.zeros(()))
        norm = math.sqrt(self.sums({"squares": float(squares)})["squares"])
        if norm > limit:
            torch._foreach_mul_(gradients, limit / (norm + 1e-6))
        return norm

    def orthogonalized(self, updates: list[Tensor]) -> list[Tensor]:
        """Muon's update of matrices of one shape: each process gets whole matrices in turn, and sends back the parts.

        Two exchanges, of one matrix per process each; no matrix is orthogonalised twice.
        """
        rows, columns = updates[0].shape
        heights = [len(range(rows)[part_of(rows, rank, self.share.count)]) for rank in range(self.share.count)]
        results: list[Tensor] = []
        for begin in range(0, len(updates), self.share.count):
            group = updates[begin : begin + self.share.count]
            parts = torch.cat([local(update) for update in group])
            mine = self.share.rank < len(group)
            size = parts.numel() // len(group)
            out = [size * (rank < len(group)) for rank in range(self.share.count)]
            back = [height * columns * mine for height in heights]
            whole = parts.new_empty(sum(back))
            dist.all_to_all_single(whole, parts.flatten(), back, out)
            if mine:
                whole = orthogonalize(whole.view(1, rows, columns)).flatten().contiguous()
            received = torch.empty_like(parts)
            dist.all_to_all_single(received.view(-1), whole, out, back)
            results += [laid_out(part, like) for part, like in zip(received.chunk(len(group)), group, strict=True)]
        return results

    # Storing ----------------------------------------------------------------------------------------------------------

    def gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole tensors in the first process's memory; nothing elsewhere."""
        whole = {}
        for name, tensor in tensors.items():
            value = self.whole(tensor)
            if self.main:
                whole[name] = value.cpu()
        return whole

    def whole(self, tensor: Tensor) -> Tensor:
        """One tensor, brought together; all processes must call it."""
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def scattered(self, tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This process's rows; of tensors that are mapped from a file, only those are ever read."""
        mine: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            model = like.get(name)
            if isinstance(model, DTensor):
                rows = tensor[part_of(len(tensor), self.share.rank, self.share.count)]
                mine[name] = laid_out(rows.to(model.device, copy=True), model)
            else:
                mine[name] = tensor
        return mine

    def save(
        self, root: Path, model: Mapping[str, Tensor], optimizer: Mapping[str, Tensor], state: TrainingState
    ) -> None:
        """What :func:`hanmo.training.checkpoint.save_checkpoint` does, with all processes.

        Raises:
            ResourceError: the disk is full; the earlier checkpoints are intact. In all processes.
        """
        groups = {"model": model, "optimizer": optimizer}
        self.write(root / f"step-{state.step:08d}", groups, {"state.json": state.record()})
        self.on_main(lambda: prune_checkpoints(root, state.step))

    def write(self, target: Path, groups: Mapping[str, Mapping[str, Tensor]], values: Mapping[str, Any]) -> None:
        """Write a folder with all processes, whole or not at all.

        Args:
            target: the folder.
            groups: the tensors of each group of files ("model", "optimizer").
            values: what is written as JSON, by file name.

        Raises:
            ResourceError: the disk is full; what stood at ``target`` is intact. In all processes.
        """
        temporary = target.parent / f".{target.name}.tmp-{self.same(os.getpid())}"

        def begin() -> None:
            make_folder(target.parent)
            clear_leftovers(target)
            temporary.mkdir()
            for name, value in values.items():
                write_json(temporary / name, value)

        def end() -> None:
            for name in values:
                fsync_path(temporary / name)
                entries[name] = {"size": (temporary / name).stat().st_size, "sha256": sha256_file(temporary / name)}
            manifest = {"kind": "checkpoint", "version": 1, "files": dict(sorted(entries.items()))}
            write_json(temporary / MANIFEST, manifest)
            fsync_path(temporary / MANIFEST)
            fsync_path(temporary)
            replace_folder(temporary, target)

        try:
            self.on_main(writing(target, begin))
            written: dict[str, dict[str, Any]] = {}
            for group, tensors in groups.items():
                mine = self.shares(tensors)
                name = f"{group}-{self.share.rank + 1:05d}-of-{self.share.count:05d}.safetensors"
                failure = None
                try:
                    written |= writing(target, lambda n=name, m=mine: write_part(temporary, n, m))()  # type: ignore[misc]
                except HanmoError as error:
                    failure = error
                self.raise_together(failure)
            entries: dict[str, dict[str, Any]] = {}
            for part in self.exchange(written):
                entries |= part
            self.on_main(writing(target, end))
        except HanmoError:
            if self.main:
                shutil.rmtree(temporary, ignore_errors=True)
            raise

    def shares(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The whole tensors that this process writes: about as many bytes as every other."""
        held, mine = [0] * self.share.count, {}
        for name in sorted(tensors):
            tensor = tensors[name]
            owner = held.index(min(held))
            held[owner] += tensor.numel() * tensor.element_size()
            value = self.whole(tensor)
            if owner == self.share.rank:
                mine[name] = value.detach().cpu()
        return mine


def write_part(folder: Path, name: str, tensors: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Write one file of whole tensors; returns its entry of the manifest. No file where there is nothing to write."""
    if not tensors:
        return {}
    path = folder / name
    write_safetensors(path, tensors)
    fsync_path(path)
    return {name: {"size": path.stat().st_size, "sha256": sha256_file(path)}}


def writing(target: Path, action: Callable[[], Any]) -> Callable[[], Any]:
    """The action with the errors of the disk as such that say what to do."""

    def run() -> Any:
        try:
            return action()
        except OSError as error:
            if error.errno not in CANNOT_WRITE:
                raise
            raise ResourceError(
                f"could not write the checkpoint: {error.strerror}",
                where=str(target),
                why="earlier checkpoints are intact",
                fix="free some space, or choose another place with --out",
                zh=f"无法写入检查点（{error.strerror}），先前的检查点完好。请腾出空间或用 --out 换一个位置",
            ) from error

    return run


def part_of(rows: int, rank: int, count: int) -> slice:
    """The rows that a process stores: equal parts, rounded up, the last ones smaller or empty.

    >>> [part_of(5, rank, 4) for rank in range(4)]
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None), slice(5, 5, None)]
    """
    size = -(-rows // count)
    return slice(min(rows, rank * size), min(rows, (rank + 1) * size))


def local(tensor: Tensor) -> Tensor:
    """This process's rows."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def laid_out(rows: Tensor, like: Tensor) -> Tensor:
    """A divided tensor from this process's rows."""
    assert isinstance(like, DTensor)
    tensor: Tensor = DTensor.from_local(
        rows, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return tensor
