"""Training beside the plain recipe: same model, rows and optimizer steps, one machine, one run.

    python benchmarks/bench_training.py --json benchmarks/training_report.json
    python benchmarks/bench_training.py --stage safety --steps 3

Runs the project's own script and benchmarks/plain_recipe.py, each in a process of its own, on the
embedded base model and on rows of mixed lengths: words of the embedded domain texts, log-normal
with medians of 45 words (questions) and 110 (answers). Only tokens of answers count as supervised,
on both sides. `GFLOP/s` is what the steps need (per token 2 operations forward and 2 backward for
each parameter of the base's linear layers, the head on supervised tokens) by the time they took,
beside the machine's best matrix product in the same precision.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

MEDIANS = {"prompt": 45, "answer": 110}  # words
SIGMA = 0.6


def write_rows(texts: list[str], target: Path, count: int) -> None:
    """A prepared data directory with `count` rows of realistic lengths in each part."""
    rng = random.Random(0)
    words = " ".join(texts).split()

    def draw(median: int) -> str:
        size = min(max(int(median * rng.lognormvariate(0, SIGMA)), 4), 300)
        start = rng.randrange(len(words) - size)
        return " ".join(words[start : start + size])

    rows: dict[str, list[dict[str, str]]] = {"domain": [], "instruction": [], "preference": []}
    for _ in range(count):
        question, answer = draw(MEDIANS["prompt"]), draw(MEDIANS["answer"])
        rows["domain"].append({"text": answer})
        rows["instruction"].append({"prompt": question, "completion": answer})
        rows["preference"].append(
            {"prompt": question, "chosen": answer, "rejected": draw(MEDIANS["answer"])}
        )
    manifest: dict = {"model_type": "smollm2", "files": {}, "counts": {}}
    for part, found in rows.items():
        for split, own in (("train", found), ("validation", found[:8])):
            name = f"{part}/{split}.jsonl"
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in own), encoding="utf-8")
            manifest["files"][name] = hashlib.sha256(path.read_bytes()).hexdigest()
            manifest["counts"][name] = {"rows": len(own)}
    (target / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def run(command: list[str]) -> None:
    result = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{result.stdout}\n{result.stderr}")


def ours(stage: str, settings: list[str], work: Path, base_yaml: Path, tag: str) -> dict:
    """The project's script for `stage`; a parent is made with one step where it needs one."""
    common = ["--config", str(base_yaml), "--data", str(work / "data")]
    order = ["domain", "instruction", "safety"]
    one_step = [f"{{}}.{key}=1" for key in ("max_steps", "batch_size", "gradient_accumulation")]
    parent = None
    for name in order[: order.index(stage) + 1]:
        output = work / (f"{name}_{tag}" if name == stage else f"{name}_parent")
        if not output.exists():
            chosen = settings if name == stage else [s.format(name) for s in one_step]
            flags = [word for setting in chosen for word in ("--set", setting)]
            source = ["--checkpoint", str(parent)] if parent else []
            run([f"train_{name}.py", *source, *common, "--output", str(output), *flags])
        parent = output
    record = json.loads((work / f"{stage}_{tag}/stage.json").read_text())
    return {**record["metrics"], "peak_rss_gb": record["peak_rss_gb"]}


def peak_gflops(dtype: str) -> float:
    """The best rate of a square matrix product on this machine, in GFLOP/s."""
    import torch

    size = 2048
    a, b = (torch.randn(size, size, dtype=getattr(torch, dtype)) for _ in range(2))
    a @ b
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best / 1e9


def needed_gflop(model: str, found: dict) -> float:
    """Floating-point operations of a run in GFLOP; attention's own products are left out."""
    from transformers import AutoConfig

    c = AutoConfig.from_pretrained(model)
    head = c.hidden_size // c.num_attention_heads
    keys = head * getattr(c, "num_key_value_heads", c.num_attention_heads)
    layer = (
        2 * c.hidden_size**2 + 2 * c.hidden_size * keys + 3 * c.hidden_size * c.intermediate_size
    )
    linear = 4 * layer * c.num_hidden_layers * found["tokens"]
    return (linear + 4 * c.hidden_size * c.vocab_size * found["supervised_tokens"]) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--stage", choices=("domain", "instruction", "safety"), default="instruction"
    )
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--gradient_accumulation", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--quantization", choices=("nf4", "none"), default="nf4")
    parser.add_argument("--cache_dir", default=".cache", help="where downloads are kept")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers here")
    args = parser.parse_args()

    from liteguard import config, datasets, models, sources

    settings = config.build(
        [
            ("yaml", config.read_yaml(ROOT / "configs/smollm2-135m.yaml")),
            ("cache", {"data": {"cache_dir": args.cache_dir}}),
        ]
    )
    model, _ = sources.base_model(settings)
    work = Path(tempfile.mkdtemp(prefix="bench_training_"))
    results: dict[str, dict] = {}
    try:
        source = config.SourceSection(dataset="mondo_text")
        rows = itertools.islice(datasets.mondo_text(source, Path(args.cache_dir)), 3_000)
        texts = [row["text"] for row in rows]
        count = args.steps * args.batch_size * args.gradient_accumulation
        write_rows(texts, work / "data", count)
        base = work / "bench.yaml"
        values = {
            "extends": str(ROOT / "configs/smollm2-135m.yaml"),
            "data": {"cache_dir": str(Path(args.cache_dir).resolve())},
        }
        base.write_text(yaml.safe_dump(values), encoding="utf-8")
        shape = {
            "max_steps": args.steps,
            "batch_size": args.batch_size,
            "gradient_accumulation": args.gradient_accumulation,
            "max_length": args.max_length,
            "eval_steps": 10_000,
            "save_steps": 10_000,
            "quantization": args.quantization,
            "learning_rate": 2e-4,
        }
        flags = [f"{args.stage}.{key}={value}" for key, value in shape.items()]
        columns = ("supervised/s", "tokens/s", "padding", "peak GB", "GFLOP/s")
        print(f"{'':34}{columns[0]:>13}{columns[1]:>10}" + "".join(f"{c:>9}" for c in columns[2:]))

        def show(name: str, found: dict) -> None:
            found["gflops"] = needed_gflop(model, found) / found["train_runtime_s"]
            results[name] = found
            print(
                f"{name:34}{found['supervised_tokens_per_s']:13.1f}{found['tokens_per_s']:10.1f}"
                f"{found['padding_share']:9.0%}{found['peak_rss_gb']:9.2f}{found['gflops']:9.0f}",
                flush=True,
            )

        show("LiteGuard", ours(args.stage, flags, work, base, "auto"))
        if (
            models.choose_dtype("auto", "llama")[0]
            is not models.choose_dtype("float32", "llama")[0]
        ):
            single = [*flags, "model.compute_dtype=float32"]
            show("LiteGuard, float32", ours(args.stage, single, work, base, "float32"))
        for padding in ("longest", "max_length"):
            if padding == "max_length" and args.stage == "safety":
                continue  # TRL pads pairs to the longest of their batch
            command = ["benchmarks/plain_recipe.py", "--stage", args.stage, "--model", str(model)]
            for key in (
                "steps",
                "batch_size",
                "gradient_accumulation",
                "max_length",
                "quantization",
            ):
                command += [f"--{key}", str(getattr(args, key))]
            command += ["--data", str(work / "data"), "--padding", padding]
            run([*command, "--json", str(work / "plain.json")])
            show(
                f"plain recipe, padded to {padding}", json.loads((work / "plain.json").read_text())
            )
        for dtype in ("float32", "bfloat16"):
            best = peak_gflops(dtype)
            results[f"matrix product, {dtype}"] = {"gflops": best}
            print(f"{'best matrix product, ' + dtype:34}{'':41}{best:9.0f}")
        print()
        for name in [n for n in results if n.startswith("LiteGuard")]:
            for other in [n for n in results if n.startswith("plain")]:
                speed, memory = (
                    results[name][key] / results[other][key]
                    for key in ("supervised_tokens_per_s", "peak_rss_gb")
                )
                print(f"{name} / {other}: supervised tokens/s x {speed:.2f}, memory x {memory:.2f}")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    from liteguard import cli

    cli.run(main)
