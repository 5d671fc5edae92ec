"""Training speed on the CPU: Hanmo beside its peers, same data, same network, same machine, same run.

    python benchmarks/training.py --size 14M --rounds 3 TEXTS...

Every row runs in a process of its own, in turn, `rounds` times; medians are printed, with the share of the machine's
fastest measured float32 matrix product that the model's operations (2 per weight and token forwards, twice that
backwards, attention included, causal) make up. All rows train a GPT of 6 layers, width 384 (14M) or 8 layers, width 512
(30M), 64 wide heads, vocabulary 8,192, sequences of 256 tokens, 16 a step, float32, AdamW.

Peers need `pip install transformers accelerate litgpt`; a row whose package is missing says so.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SIZES = {"14M": (6, 384), "30M": (8, 512)}
VOCABULARY, CONTEXT, BATCH = 8192, 256, 16
WARM = 3  # steps that are not timed

Step = Callable[[Any, Any], None]


def batches(tokens: Any, seed: int = 0) -> Iterator[tuple[Any, Any]]:
    """Random windows and their targets, int64 ``[BATCH, CONTEXT]``."""
    import numpy as np
    import torch

    generator = np.random.default_rng(seed)
    while True:
        starts = generator.integers(0, len(tokens) - CONTEXT - 1, BATCH)
        block = torch.from_numpy(np.stack([tokens[at : at + CONTEXT + 1] for at in starts]).astype(np.int64))
        yield block[:, :-1].contiguous(), block[:, 1:].contiguous()


def timed(step: Step, tokens: Any, seconds: float) -> dict[str, float]:
    """Median tokens per second of a plain loop, and how long the first step took."""
    times, source = [], batches(tokens)
    began = time.perf_counter()
    while len(times) < WARM + 3 or time.perf_counter() - began < seconds:
        ids, targets = next(source)
        start = time.perf_counter()
        step(ids, targets)
        times.append(time.perf_counter() - start)
    return {"speed": BATCH * CONTEXT / statistics.median(times[WARM:]), "first": times[0]}


# Peers ---------------------------------------------------------------------------------------------------------------


def adamw(model: Any, **options: Any) -> Any:
    """The optimizer of every plain loop."""
    import torch

    return torch.optim.AdamW(model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, **options)


def gpt2(layers: int, width: int) -> Any:
    """transformers' GPT-2."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_embd=width,
        n_layer=layers,
        n_head=width // 64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    return GPT2LMHeadModel(config)


def transformers_loop(layers: int, width: int, tokens: Any, seconds: float) -> dict[str, float]:
    """transformers' GPT-2 in a plain loop."""
    model = gpt2(layers, width).train()
    optimizer = adamw(model)

    def step(ids: Any, targets: Any) -> None:
        import torch.nn.functional as F

        loss = F.cross_entropy(model(ids).logits.flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return timed(step, tokens, seconds)


def transformers_trainer(layers: int, width: int, tokens: Any, seconds: float) -> dict[str, float]:
    """transformers' GPT-2 through its Trainer."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Windows(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return 1_000_000

        def __getitem__(self, index: int) -> dict[str, Any]:
            at = index * 131 % (len(tokens) - CONTEXT)
            ids = torch.from_numpy(tokens[at : at + CONTEXT].astype("int64"))
            return {"input_ids": ids, "labels": ids}

    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:  # noqa: ARG002
            times.append(time.perf_counter())
            if len(times) > WARM + 3 and times[-1] - times[0] > seconds:
                control.should_training_stop = True

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=BATCH,
            max_steps=100_000,
            learning_rate=3e-4,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
        )
        Trainer(model=gpt2(layers, width), args=arguments, train_dataset=Windows(), callbacks=[Clock()]).train()
    gaps = [b - a for a, b in zip(times[WARM:], times[WARM + 1 :], strict=False)]
    return {"speed": BATCH * CONTEXT / statistics.median(gaps), "first": 0.0}


def litgpt_loop(layers: int, width: int, tokens: Any, seconds: float) -> dict[str, float]:
    """litgpt's GPT in a plain loop."""
    from litgpt.config import Config
    from litgpt.model import GPT

    config = Config(
        n_layer=layers,
        n_embd=width,
        n_head=width // 64,
        padded_vocab_size=VOCABULARY,
        vocab_size=VOCABULARY,
        block_size=CONTEXT,
    )
    model = GPT(config).train()
    optimizer = adamw(model)

    def step(ids: Any, targets: Any) -> None:
        import torch.nn.functional as F

        loss = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return timed(step, tokens, seconds)


def small_gpt(layers: int, width: int) -> Any:
    """A GPT in the manner of nanoGPT: one product for queries, keys and values, torch's own attention, tied output."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
            self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
            self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

        def forward(self, x: Any) -> Any:
            batch, length, _ = x.shape
            parts = self.qkv(self.norm1(x)).split(width, dim=2)
            q, k, v = (part.view(batch, length, width // 64, 64).transpose(1, 2) for part in parts)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).reshape(batch, length, width))
            return x + self.down(F.gelu(self.up(self.norm2(x))))

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(CONTEXT, width)
            self.blocks, self.norm = nn.ModuleList(Block() for _ in range(layers)), nn.LayerNorm(width, bias=False)
            for parameter in self.parameters():
                if parameter.dim() > 1:
                    nn.init.normal_(parameter, std=0.02)

        def hidden(self, ids: Any) -> Any:
            x = self.tokens(ids) + self.places(torch.arange(ids.size(1)))
            for block in self.blocks:
                x = block(x)
            return self.norm(x)

        def forward(self, ids: Any, targets: Any) -> Any:
            return F.cross_entropy((self.hidden(ids) @ self.tokens.weight.t()).flatten(0, 1), targets.flatten())

        def chunked(self, ids: Any, targets: Any, rows: int = 512) -> Any:
            hidden, flat = self.hidden(ids).flatten(0, 1), targets.flatten()
            pieces = zip(hidden.split(rows), flat.split(rows), strict=True)
            parts = [F.cross_entropy(h @ self.tokens.weight.t(), t, reduction="sum") for h, t in pieces]
            return torch.stack(parts).sum() / flat.numel()

    return Network()


def nano(layers: int, width: int, tokens: Any, seconds: float, form: str = "plain") -> dict[str, float]:
    """nanoGPT's manner: fused AdamW; plain, compiled, or with the loss in chunks."""
    import torch

    model = small_gpt(layers, width)
    optimizer = adamw(model, fused=True)
    forward = {"plain": model, "compiled": torch.compile(model), "chunked": model.chunked}[form]

    def step(ids: Any, targets: Any) -> None:
        forward(ids, targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return timed(step, tokens, seconds)


# Hanmo ---------------------------------------------------------------------------------------------------------------


def hanmo(
    layers: int, width: int, tokens: Any, seconds: float, *, layout: str = "gpt2", precision: str = "fp32"
) -> dict[str, float]:
    """Hanmo's own trainer, with log, schedule and clipping, as `hanmo pretrain` runs it; AdamW as the peers have it.

    Args:
        layout: "gpt2": the peers' network; "qwen3": rotary positions, RMSNorm, QK-norm and a gated feed-forward layer
            of about the same size, which is what `hanmo pretrain` builds.
        precision: of the products inside the blocks.
    """
    import torch

    from hanmo.models.device import set_threads
    from hanmo.models.kernels.products import set_precision
    from hanmo.models.transformer import Transformer, TransformerConfig
    from hanmo.training.fit import FitSettings, Trainer
    from hanmo.training.objectives import CausalLanguageModeling
    from hanmo.training.optimizer import OptimizerSettings

    set_threads()
    heads = width // 64
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": 64,
        "max_position_embeddings": CONTEXT,
    }
    if layout == "gpt2":
        config = TransformerConfig(
            **common,
            intermediate_size=4 * width,
            model_type="gpt2",
            norm="layer",
            norm_bias=True,
            positions="learned",
            gated=False,
            activation="gelu_tanh",
            attention_bias=True,
            output_bias=True,
            mlp_bias=True,
        )
    else:
        config = TransformerConfig(**common, intermediate_size=8 * width // 3, model_type="qwen3", qk_norm=True)
    model = Transformer(config)
    model.initialize(0)
    set_precision(model, precision)
    split = len(tokens) - 10 * CONTEXT
    objective = CausalLanguageModeling(
        tokens[:split], tokens[split:], context=CONTEXT, batch_size=BATCH, micro_batch=BATCH, seed=0
    )
    optimizer = OptimizerSettings(
        embedding_rate=3e-4, vector_rate=3e-4, muon=False, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-8
    )
    times: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        settings = FitSettings(optimizer, budget_seconds=seconds, evaluations=1)
        trainer = Trainer(model, objective, settings, Path(folder), device=torch.device("cpu"))
        plain = trainer.step

        def step(done: float) -> float:
            start = time.perf_counter()
            loss = plain(done)
            times.append(time.perf_counter() - start)
            return loss

        trainer.step = step  # type: ignore[method-assign]
        trainer.fit()
    return {"speed": BATCH * CONTEXT / statistics.median(times[WARM:]), "first": times[0]}


ROWS: dict[str, Callable[[int, int, Any, float], dict[str, float]]] = {
    "HF Trainer, GPT-2": transformers_trainer,
    "transformers GPT-2, plain loop": transformers_loop,
    "litgpt GPT, plain loop": litgpt_loop,
    "nanoGPT style, fused AdamW": nano,
    "nanoGPT style, compiled": lambda *a: nano(*a, form="compiled"),
    "nanoGPT style, loss in chunks": lambda *a: nano(*a, form="chunked"),
    "Hanmo, GPT-2": hanmo,
    "Hanmo, its own layout (Qwen3)": lambda *a: hanmo(*a, layout="qwen3"),
    "Hanmo, GPT-2, int8 products": lambda *a: hanmo(*a, precision="int8"),
    "Hanmo, its own layout, int8": lambda *a: hanmo(*a, layout="qwen3", precision="int8"),
}


def quality(size: str, tokens: Any, steps: int, precision: str) -> tuple[float, float]:
    """Validation loss and seconds of `steps` steps, with a share of the text held out; the same seed and batches."""
    import torch

    from hanmo.models.device import set_threads
    from hanmo.models.kernels.products import set_precision
    from hanmo.models.transformer import Transformer, TransformerConfig
    from hanmo.training.fit import FitSettings, Trainer
    from hanmo.training.objectives import CausalLanguageModeling
    from hanmo.training.optimizer import OptimizerSettings

    set_threads()
    layers, width = SIZES[size]
    heads = width // 64
    config = TransformerConfig(
        VOCABULARY, width, layers, heads, heads, 64, 8 * width // 3, CONTEXT, qk_norm=True, model_type="qwen3"
    )
    model = Transformer(config)
    model.initialize(0)
    set_precision(model, precision)
    split = len(tokens) * 19 // 20
    objective = CausalLanguageModeling(
        tokens[:split], tokens[split:], context=CONTEXT, batch_size=BATCH, micro_batch=BATCH, seed=0
    )
    with tempfile.TemporaryDirectory() as folder:
        settings = FitSettings(OptimizerSettings(), max_steps=steps, evaluations=2)
        result = Trainer(model, objective, settings, Path(folder), device=torch.device("cpu")).fit()
    return result.validation_loss, result.seconds


# The run -------------------------------------------------------------------------------------------------------------


def operations(size: str) -> float:
    """Floating-point operations per token, forwards and backwards, of the GPT that all rows train."""
    layers, width = SIZES[size]
    weights = layers * 12 * width * width + VOCABULARY * width
    return 6.0 * weights + 6.0 * layers * width * CONTEXT


def product_rates() -> dict[str, float]:
    """Operations per second of a float32 product, by library."""
    import torch

    x, w = torch.randn(4096, 768), torch.randn(768, 768)
    forms: dict[str, Callable[[], Any]] = {"torch's default": lambda: x @ w.t()}
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        forms["oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    rates = {}
    for name, form in forms.items():
        times = []
        for _ in range(40):
            start = time.perf_counter()
            form()
            times.append(time.perf_counter() - start)
        rates[name] = 2 * 4096 * 768 * 768 / min(times)
    return rates


def read_tokens(paths: list[str], target: Path) -> int:
    """Tokenise the texts into a vocabulary of 8,192 and write them as one array."""
    import numpy as np

    from hanmo.data.readers import read_documents
    from hanmo.data.stdlib import stdlib_paths
    from hanmo.text.training import train_bpe

    texts = [document.text for document in read_documents(paths or stdlib_paths())]
    tokenizer = train_bpe(texts, VOCABULARY)
    ids = [id for text in texts for id in [*tokenizer.encode(text), tokenizer.eos_id]]
    np.save(target, np.array(ids, dtype=np.uint16))
    return len(ids)


def compare_precisions(size: str, texts: list[str], steps: int) -> None:
    """Train the same network on the same batches with products in fp32 and in int8."""
    import numpy as np

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.npy"
        read_tokens(texts, path)
        tokens = np.load(path, mmap_mode="r")
        losses = {}
        for precision in ("fp32", "int8"):
            losses[precision], seconds = quality(size, tokens, steps, precision)
            speed = steps * BATCH * CONTEXT / seconds
            print(
                f"{precision}: validation loss {losses[precision]:.4f} after {steps} steps, {speed:,.0f} tok/s",
                flush=True,
            )
        print(f"int8 over fp32: {losses['int8'] / losses['fp32'] - 1:+.2%}")


def main() -> None:
    """Run the rows in turn and print the table; with --row, be one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="*", help="files or folders; default: Python's standard library")
    parser.add_argument("--size", default="14M", choices=sorted(SIZES))
    parser.add_argument("--seconds", type=float, default=20.0, help="per row and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[], help="rows whose names contain one of these")
    parser.add_argument(
        "--quality", type=int, metavar="STEPS", help="instead: final loss in fp32 and int8, so many steps"
    )
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--tokens", help=argparse.SUPPRESS)
    given = parser.parse_args()
    layers, width = SIZES[given.size]
    if given.row:
        import numpy as np

        result = ROWS[given.row](layers, width, np.load(given.tokens, mmap_mode="r"), given.seconds)
        print(json.dumps(result))
        return
    import torch

    from hanmo.cli.doctor import processor

    rates = product_rates()
    peak = max(rates.values())
    print(f"{processor()}; {torch.get_num_threads()} threads")
    print("float32 products: " + ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in rates.items()))
    print(
        f"Python {platform.python_version()}, torch {torch.__version__}; {given.size}: {layers} layers, width {width}"
    )
    if given.quality:
        compare_precisions(given.size, given.texts, given.quality)
        return
    rows = [name for name in ROWS if not given.only or any(part in name for part in given.only)]
    speeds: dict[str, list[float]] = {name: [] for name in rows}
    firsts: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        tokens = Path(folder) / "tokens.npy"
        print(
            f"{read_tokens(given.texts, tokens):,} tokens; {given.rounds} rounds of {given.seconds:g} s a row",
            flush=True,
        )
        for _ in range(given.rounds):
            for name in rows:
                command = [sys.executable, __file__, "--row", name, "--tokens", str(tokens)]
                command += ["--size", given.size, "--seconds", str(given.seconds)]
                done = subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)
                if done.returncode:
                    print(f"{name}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
                    continue
                result = json.loads(done.stdout.strip().splitlines()[-1])
                speeds[name].append(result["speed"])
                firsts[name] = result["first"]
    base = statistics.median(speeds.get("HF Trainer, GPT-2") or [math.nan])
    print(f"\n{'row':34} {'tok/s':>8} {'of peak':>8} {'vs HF Trainer':>14} {'first step':>11}")
    for name, values in speeds.items():
        if values:
            speed = statistics.median(values)
            share = speed * operations(given.size) / peak
            print(f"{name:34} {speed:8,.0f} {share:8.0%} {speed / base:13.2f}x {firsts[name]:9.1f} s")


if __name__ == "__main__":
    main()
