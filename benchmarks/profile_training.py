"""Where the time of a training step goes, by kind of work.

    python benchmarks/profile_training.py train_instruction.py --checkpoint domain_checkpoint ...

Runs one of the three training scripts with its own arguments, in this process and with torch's
profiler on during its second optimizer step (of two at least), and prints the processor time of
every kind of work, with its operations per second where it is matrix products. `--json FILE` before
the script's name also writes the numbers. benchmarks/bench_training.py --profile calls it.

Every operation counts for the time it spends itself, not in operations that it calls. A product is
told by its shapes: one with the adapter's rank among its sizes is LoRA's.
"""

from __future__ import annotations

import argparse
import json
import runpy
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "mkldnn::_linear_pointwise")
# An operation belongs to the first of these that it, or an operation around it, is named after.
AROUND = {
    "optimizer": ("Optimizer.step", "Optimizer.zero_grad", "aten::_foreach", "aten::_fused_adam"),
    "head": ("TargetScores", "_ChunkedLogProb"),
    "attention": ("scaled_dot_product", "ScaledDotProduct"),
    "NF4 dequantisation": ("bitsandbytes::dequantize", "MatMul4Bit", "bitsandbytes::gemm"),
}


def kind(event: Any, rank: int) -> str:
    """Kind of work of a profiler event."""
    names, above = [], event
    while above is not None:
        names.append(above.name)
        above = above.cpu_parent
    backward = any(name.startswith("autograd::engine") for name in names)
    direction = "backward" if backward else "forward"
    product = event.name in PRODUCTS
    for found in ("optimizer", "head", "attention"):
        if any(part in name for part in AROUND[found] for name in names):
            return found
    if product:
        sizes = {size for shape in event.input_shapes for size in shape if shape}
        return "LoRA products" if rank in sizes else f"linear layers, {direction}"
    if any(part in name for part in AROUND["NF4 dequantisation"] for name in names):
        return "NF4 dequantisation"
    return f"norms, element-wise, copies, {direction}"


def operations(event: Any) -> int:
    """Floating-point operations of a matrix product, 0 for what is none."""
    shapes = [shape for shape in event.input_shapes if len(shape) >= 2]
    if event.name not in PRODUCTS or len(shapes) < 2:
        return 0
    left, right = shapes[-2:]
    if event.name == "mkldnn::_linear_pointwise":
        right = right[::-1]  # (rows of the result, inner size)
    rows = 1
    for size in left[:-1]:
        rows *= size
    return 2 * rows * left[-1] * right[-1]


def breakdown(profile: Any, seconds: float, rank: int) -> dict[str, dict[str, float]]:
    """Kind of work -> {"s", "gflop"} of a profiled step that took `seconds` of processor time."""
    found: dict[str, dict[str, float]] = defaultdict(lambda: {"s": 0.0, "gflop": 0.0})
    for event in profile.events():
        own = found[kind(event, rank)]
        own["s"] += event.self_cpu_time_total / 1e6
        own["gflop"] += operations(event) / 1e9
    return dict(found)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", metavar="FILE", help="also write the numbers here")
    parser.add_argument("script", help="train_domain.py, train_instruction.py or train_safety.py")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the script")
    args = parser.parse_args()

    import torch
    from transformers import TrainerCallback

    from liteguard.training.callbacks import stage_callbacks

    profile = torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
    )
    taken: dict[str, float] = {}

    class Profile(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                profile.start()
                taken["started"] = time.process_time()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                taken["s"] = time.process_time() - taken["started"]
                profile.stop()

    ranks: list[int] = []
    callbacks = stage_callbacks

    def with_profile(stage: Any) -> list[Any]:
        ranks.append(stage.config.domain.lora_rank)
        return [*callbacks(stage), Profile()]

    stage_callbacks = with_profile
    sys.argv = [args.script, *args.arguments]
    runpy.run_path(str(ROOT / args.script), run_name="__main__")
    parts = breakdown(profile, taken["s"], ranks[0])
    total = sum(part["s"] for part in parts.values())
    print(f"\n{'one optimizer step':42}{'s':>8}{'share':>8}{'GFLOP/s':>9}")
    for name, part in sorted(parts.items(), key=lambda item: -item[1]["s"]):
        rate = f"{part['gflop'] / part['s']:9.0f}" if part["gflop"] and part["s"] else ""
        print(f"{name:42}{part['s']:8.2f}{part['s'] / total:8.1%}{rate}")
    if args.json:
        Path(args.json).write_text(json.dumps(parts, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
