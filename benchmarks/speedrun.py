"""Time to quality on tinyshakespeare, character level: loss on the whole validation part after a training budget.

    python benchmarks/speedrun.py ../shared/data/tinyshakespeare/input.txt --budget 180s

Runs `hanmo pretrain` as a user would (character tokenizer, the first 90 % of the characters train, the last 10 % are
validated), and prints hardware, versions, settings and the result. nanoGPT's published recipe for a CPU ends at
1.886 (after 66 s on a machine with 314 GFLOP/s). Three minutes on one machine are not three minutes on another, so the
measured rate is printed beside the loss.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from hanmo.cli.doctor import processor
from hanmo.training.plan import measure_matrix_rate


def main() -> None:
    """Run, print, and optionally append to a results file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="tinyshakespeare's input.txt")
    parser.add_argument("--budget", default="180s")
    parser.add_argument("extra", nargs="*", help="further flags for hanmo pretrain, after --")
    given = parser.parse_args()
    rate = measure_matrix_rate(torch.device("cpu")) / 1e9
    print(f"{processor()}; {torch.get_num_threads()} threads; {rate:.0f} GFLOP/s in float32 products")
    print(f"Python {platform.python_version()}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "hanmo", "pretrain", given.text, "--tokenizer", "char"]
        command += ["--split", "tail", "--validation-share", "0.1", "--test-share", "0"]
        command += ["--budget", given.budget, "--out", str(Path(folder) / "run"), "--json", *given.extra]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        result = json.loads(done.stdout)
        settings = json.loads((Path(folder) / "run" / "settings.json").read_text())["settings"]
    keys = ("size", "context", "batch_size", "learning_rate", "weight_decay", "seed")
    print("settings: " + ", ".join(f"{key} {settings[key]}" for key in keys))
    print(
        f"loss on the whole validation part: {result['validation_loss']:.4f} after {result['seconds']:.0f} s, "
        f"{result['steps']} steps, {result['tokens'] / 1e6:.2f} M tokens, {result['tokens_per_second']:,.0f} tok/s"
    )


if __name__ == "__main__":
    main()
