"""Training beside TRL at its best and beside the plain recipe: same model, rows, optimizer steps.

    python benchmarks/bench_training.py --json benchmarks/training_report.json
    python benchmarks/bench_training.py --stage safety --steps 3
    python benchmarks/bench_training.py --profile              # and where LiteGuard's time goes
    OMP_NUM_THREADS=1 python benchmarks/bench_training.py      # on a machine with other work

Runs the project's own script, benchmarks/trl_recipe.py and benchmarks/plain_recipe.py, each in a
process of its own, on the embedded base model and on rows of mixed lengths: words of the embedded
domain texts, log-normal with medians of 45 words (questions) and 110 (answers). LiteGuard and TRL
run in the precision that suits the machine and, where that is not float32, in float32 as well; both
train the same adapter. Only tokens of answers count as supervised, on all sides.

`GFLOP/s` is what the steps need (per token 2 operations forward and 2 backward for each parameter
of the base's linear layers, the head on supervised tokens) by the time they took, and `of best` its
share of the machine's best matrix product in the same precision. `per CPU s` is supervised tokens
by seconds of processor time: beside other work, and with one thread, the fairer comparison.
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
LONGEST = 280  # words of a question and its answer together: they fit into the default max_length
PARENTS = {"domain": None, "instruction": "domain", "safety": "instruction"}


def write_rows(texts: list[str], target: Path, count: int) -> None:
    """A prepared data directory with `count` rows of realistic lengths in each part."""
    rng = random.Random(0)
    words = " ".join(texts).split()

    def draw(median: int, most: int) -> str:
        size = min(max(int(median * rng.lognormvariate(0, SIGMA)), 4), most)
        start = rng.randrange(len(words) - size)
        return " ".join(words[start : start + size])

    rows: dict[str, list[dict[str, str]]] = {"domain": [], "instruction": [], "preference": []}
    for _ in range(count):
        question = draw(MEDIANS["prompt"], LONGEST // 2)
        left = LONGEST - len(question.split())
        answer = draw(MEDIANS["answer"], left)
        rows["domain"].append({"text": answer})
        rows["instruction"].append({"prompt": question, "completion": answer})
        rows["preference"].append(
            {"prompt": question, "chosen": answer, "rejected": draw(MEDIANS["answer"], left)}
        )
    manifest: dict = {"model_type": "smollm2", "files": {}, "counts": {}}
    for part, found in rows.items():
        for split, own in (("train", found), ("validation", found[:8])):
            name = f"{part}/{split}.jsonl"
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in own), encoding="utf-8")
            manifest["files"][name] = hashlib.sha256(path.read_bytes()).hexdigest()
            words = sum(len(value.split()) for row in own for value in row.values())
            manifest["counts"][name] = {"rows": len(own), "words": words}
    (target / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def run(command: list[str]) -> str:
    """What a command of this repository prints."""
    result = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{result.stdout}\n{result.stderr}")
    return result.stdout


def ours(stage: str, settings: list[str], work: Path, base_yaml: Path, tag: str) -> dict:
    """The project's script for `stage`; a parent is made with one step where it needs one."""
    common = ["--config", str(base_yaml), "--data", str(work / "data")]
    order = list(PARENTS)
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


def recipe(script: str, args: argparse.Namespace, work: Path, flags: list[str]) -> dict:
    """What a recipe's script measures with the settings that all recipes share."""
    command = [f"benchmarks/{script}", "--stage", args.stage, "--data", str(work / "data")]
    for key in ("steps", "batch_size", "gradient_accumulation", "max_length", "quantization"):
        command += [f"--{key}", str(getattr(args, key))]
    run([*command, *flags, "--json", str(work / "recipe.json")])
    return json.loads((work / "recipe.json").read_text())


def prepare(args: argparse.Namespace, work: Path) -> Path:
    """Write the rows and the YAML of all runs into `work`; returns the YAML."""
    from liteguard import config
    from liteguard.embedded import diseases

    source = config.SourceSection(dataset="mondo_text")
    rows = itertools.islice(diseases.mondo_text(source, Path(args.cache_dir)), 3_000)
    count = args.steps * args.batch_size * args.gradient_accumulation
    write_rows([row["text"] for row in rows], work / "data", count)
    values = {
        "extends": str(ROOT / "configs/smollm2-135m.yaml"),
        "data": {"cache_dir": str(Path(args.cache_dir).resolve())},
        "safety": {"kind_weights": "prepared"},  # these rows have no kinds
    }
    (work / "bench.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return work / "bench.yaml"


def measure(args: argparse.Namespace, model: str, work: Path) -> dict[str, dict]:
    """All rows of the table, printed as they come."""
    from liteguard import models

    base = prepare(args, work)
    first = str(models.choose_dtype("auto", "llama")[0]).removeprefix("torch.")
    precisions = dict.fromkeys([first, "float32"])
    best = {dtype: peak_gflops(dtype) for dtype in ("float32", *precisions)}
    results: dict[str, dict] = {}
    columns = ("padding", "peak GB", "GFLOP/s", "of best", "per CPU s")
    print(f"{'':34}{'supervised/s':>13}{'tokens/s':>10}" + "".join(f"{c:>10}" for c in columns))

    def show(name: str, dtype: str, found: dict) -> None:
        found["gflops"] = needed_gflop(model, found) / found["train_runtime_s"]
        found["share_of_best"] = found["gflops"] / best[dtype]
        found["supervised_per_cpu_s"] = found["supervised_tokens"] / found["train_cpu_s"]
        results[name] = found
        print(
            f"{name:34}{found['supervised_tokens_per_s']:13.1f}{found['tokens_per_s']:10.1f}"
            f"{found['padding_share']:10.0%}{found['peak_rss_gb']:10.2f}{found['gflops']:10.0f}"
            f"{found['share_of_best']:10.0%}{found['supervised_per_cpu_s']:10.1f}",
            flush=True,
        )

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
    for dtype in precisions:
        suffix = "" if dtype == first else f", {dtype}"
        settings = [*flags, f"model.compute_dtype={dtype}"]
        show(f"LiteGuard{suffix}", dtype, ours(args.stage, settings, work, base, dtype))
        for batching in ("padded",) if args.stage == "safety" else ("padding_free", "padded"):
            chosen = ["--config", str(base), "--dtype", dtype, "--batching", batching]
            parent = work / f"{PARENTS[args.stage]}_parent"
            chosen += ["--parent", str(parent)] if parent.exists() else []
            found = recipe("trl_recipe.py", args, work, chosen)
            show(f"TRL, {batching.replace('_', ' ')}{suffix}", dtype, found)
    for padding in ("longest", "max_length"):
        if padding == "max_length" and args.stage == "safety":
            continue  # TRL pads pairs to the longest of their batch
        chosen = ["--model", model, "--padding", padding]
        found = recipe("plain_recipe.py", args, work, chosen)
        show(f"plain recipe, padded to {padding}", "float32", found)
    for dtype, rate in best.items():
        results[f"matrix product, {dtype}"] = {"gflops": rate}
        print(f"{'best matrix product, ' + dtype:34}{'':43}{rate:10.0f}")
    if args.profile:
        print(where_time_goes(args.stage, flags, work, base))
    return results


def where_time_goes(stage: str, flags: list[str], work: Path, base: Path) -> str:
    """The table of benchmarks/profile_training.py for LiteGuard's run."""
    parent = PARENTS[stage]
    command = ["benchmarks/profile_training.py", f"train_{stage}.py", "--config", str(base)]
    command += ["--checkpoint", str(work / f"{parent}_parent")] if parent else []
    command += ["--data", str(work / "data"), "--output", str(work / "profiled")]
    text = run([*command, *(word for flag in flags for word in ("--set", flag))])
    return text[text.index("\none optimizer step") :]


def ratios(results: dict[str, dict]) -> list[str]:
    """Lines that compare LiteGuard with the other recipes of its precision, TRL's best last."""
    lines = []
    for name in [n for n in results if n.startswith("LiteGuard")]:
        suffix = name.removeprefix("LiteGuard")
        for other in [n for n in results if n.startswith(("TRL", "plain"))]:
            if other.startswith("TRL") and other.endswith(", float32") != bool(suffix):
                continue
            speed, per_cpu, memory = (
                results[name][key] / results[other][key]
                for key in ("supervised_tokens_per_s", "supervised_per_cpu_s", "peak_rss_gb")
            )
            results[name].setdefault("against", {})[other] = {
                "speed": speed,
                "per_cpu_s": per_cpu,
                "memory": memory,
            }
            lines.append(
                f"{name} / {other}: {speed:.2f} x supervised tokens/s ({per_cpu:.2f} x per second "
                f"of processor time), {memory:.2f} x memory"
            )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--stage", choices=tuple(PARENTS), default="instruction")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--gradient_accumulation", type=int, default=4)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--quantization", choices=("nf4", "none"), default="nf4")
    parser.add_argument("--profile", action="store_true", help="also print where the time goes")
    parser.add_argument("--cache_dir", default=".cache", help="where downloads are kept")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers here")
    args = parser.parse_args()

    from liteguard import models
    from liteguard.config import build, read_yaml

    settings = build(
        [
            ("yaml", read_yaml(ROOT / "configs/smollm2-135m.yaml")),
            ("cache", {"data": {"cache_dir": args.cache_dir}}),
        ]
    )
    model, _ = models.base_model(settings)
    work = Path(tempfile.mkdtemp(prefix="bench_training_"))
    try:
        results = measure(args, str(model), work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print("\n" + "\n".join(ratios(results)))
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    from liteguard import cli

    cli.run(main)
