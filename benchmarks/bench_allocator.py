"""How a training step's speed holds on a CPU under other memory allocators.

    python benchmarks/bench_allocator.py
    python benchmarks/bench_allocator.py --seconds 120 --json allocator.json

Forward and backward passes of the embedded model with LoRA over rows of 150 to 512 tokens, of a new
length each time as packed micro-batches have them: every tensor has a new size, and the free memory
of the C library ends in pieces of thousands of sizes that each request is looked up among. Each
allocator gets a process of its own; what is printed are tokens a second of every tenth of its time.
jemalloc and tcmalloc are measured where the system has them (Debian: libjemalloc2,
libtcmalloc-minimal4). The last line is the C library's with lengths filled up as the stages fill
their micro-batches; the filling is not counted. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import ctypes.util
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from liteguard import cli, planning, registry
from liteguard.checkpoints import write_json
from liteguard.errors import UserError
from liteguard.training.packing import CPU_LENGTHS

ROWS = (150, 512)  # tokens: the least and the most of one
SUPERVISED = 100  # tokens of a row whose logits are computed
PARTS = 10


def allocators() -> dict[str, tuple[dict[str, str], int]]:
    """Name -> (environment that brings it, what lengths are multiples of)."""
    found: dict[str, tuple[dict[str, str], int]] = {"the C library's": ({}, 1)}
    for name in ("jemalloc", "tcmalloc_minimal"):
        if library := ctypes.util.find_library(name):
            found[name] = ({"LD_PRELOAD": library}, 1)
    found[f"its, {CPU_LENGTHS} at a time"] = ({}, CPU_LENGTHS)
    return found


def measure(seconds: float, multiple: int) -> list[float]:
    """Tokens a second of each tenth of so many seconds; a row's padding is not counted."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = registry.MODELS[planning.SMOLLM2](planning.SMOLLM2, Path(".cache"))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=32, lora_alpha=32, target_modules="all-linear"))
    draw, speeds = random.Random(0), []
    for _ in range(PARTS):
        tokens, started = 0, time.monotonic()
        while (took := time.monotonic() - started) < seconds / PARTS:
            length = draw.randint(*ROWS)
            row = torch.randint(0, model.config.vocab_size, (1, -(-length // multiple) * multiple))
            logits = model(input_ids=row, logits_to_keep=SUPERVISED).logits
            logits.float().logsumexp(-1).mean().backward()
            model.zero_grad(set_to_none=True)
            tokens += length
        speeds.append(round(tokens / took, 1))
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="for each allocator")
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--multiple", type=int, help=argparse.SUPPRESS)  # of a worker
    args = parser.parse_args()
    if args.seconds <= 0:
        raise UserError("--seconds must be more than 0")
    if args.multiple:
        print(json.dumps(measure(args.seconds, args.multiple)))
        return
    report = {}
    for name, (environment, multiple) in allocators().items():
        command = [sys.executable, __file__, "--seconds", str(args.seconds)]
        command += ["--multiple", str(multiple)]
        done = subprocess.run(
            command, env=os.environ | environment, capture_output=True, text=True, check=True
        )
        report[name] = json.loads(done.stdout.splitlines()[-1])
        print(f"{name:18} tok/s: {' '.join(f'{speed:.0f}' for speed in report[name])}", flush=True)
    if args.json:
        write_json(Path(args.json), report)


if __name__ == "__main__":
    cli.run(main)
