"""How fast a bundle answers, and what prefill lengths, KV cache and threads have to do with it.

    python benchmarks/bench_bundle.py --input final_checkpoint
    python benchmarks/bench_bundle.py --input final_checkpoint --llama_python ../llama/bin/python

Exports one checkpoint several times (one long prefill length as in the original guide, a ladder of
lengths, a short KV cache), quantises each to the same recipe and measures prefill and decode
tokens/s and the time to the first token of a prompt of about 40 tokens, with 1 and 2 threads.
With --llama_python (a Python that has llama-cpp-python; it is no dependency of LiteGuard) the same
weights run as a GGUF in llama.cpp beside it: Q8_0, or Q4_0 beside a recipe of 4 bits. Ratios are
from one run, for each number of threads; the rounds of all
variants are interleaved, and each number is the best of its rounds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import llama as llama_cpp

from liteguard import checkpoints, cli, models
from liteguard.config import RECIPES, Config
from liteguard.export import bundle, gguf_file, merge, quantization, silence, tflite, tokenizer
from liteguard.runtime.workers import BundleWorkers

LADDER = [32, 64, 128, 256, 1024]
VARIANTS = {
    "prefill 1024": ([1024], 1280),
    "ladder": (LADDER, 1280),
    "ladder, KV cache 512": (LADDER[:-1], 512),
}
# About 40 tokens with a prompt's prefixes and suffixes.
QUESTION = (
    "What are the signs of a stroke, and what should I do first when I see them in someone? "
    "Please keep it short and simple."
)


def best(runs: list[dict[str, float]]) -> dict[str, float]:
    """Each measure's best value."""
    keys = ("prefill_tokens", "first_token_s", "prefill_tok_s", "decode_tok_s")
    return {
        key: round((min if key == "first_token_s" else max)(run[key] for run in runs), 4)
        for key in keys
    }


def build(args: argparse.Namespace, work: Path) -> tuple[Config, dict[str, Path], Path]:
    """(configuration, bundle of each variant, merged directory)."""
    record = checkpoints.read_stage(Path(args.input), "safety")
    config = Config.model_validate(record.config)
    base, _ = models.base_model(config)
    merged = work / "merged"
    merge.merge_adapter(base, Path(args.input), merged, config.prompt)
    vocabulary = tokenizer.build_sentencepiece(merged, work / "tokenizer.model")
    silenced = silence.Silence.of(vocabulary, merged)
    made = {}
    for number, (name, (lengths, cache)) in enumerate(VARIANTS.items()):
        exact, model = work / "float.tflite", work / f"{number}.tflite"
        tflite.export(merged, exact, prefill_lengths=lengths, kv_cache_length=cache, progress=None)
        tflite.quantize(exact, model, args.quantize, merged, progress=None)
        made[name] = work / f"{number}.task"
        bundle.write_task(model, work / "tokenizer.model", config.prompt, made[name], silenced)
        exact.unlink()
        model.unlink()
        print(f"made {name}: {made[name].stat().st_size / 1e6:.1f} MB", flush=True)
    return config, made, merged


def measure(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """{"threads": {"1": {variant: numbers}}, "ratios": ...}"""
    config, made, merged = build(args, work)
    prompt, file = config.prompt.render_question(QUESTION), work / "model.gguf"
    kind = "Q4_0" if args.quantize in quantization.BLOCKS else "Q8_0"
    peer = f"llama.cpp {kind}"
    if args.llama_python and kind == "Q8_0":
        gguf_file.write(merged, config.prompt, file)
    elif args.llama_python:
        gguf_file.write(merged, config.prompt, work / "f16.gguf", matrices="F16")
        llama_cpp.quantize(args.llama_python, work / "f16.gguf", file, kind)
    report: dict[str, Any] = {
        "quantize": args.quantize,
        "bytes": {name: path.stat().st_size for name, path in made.items()},
        "threads": {},
    }
    for threads in args.threads:
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in made}
        llama = None
        if args.llama_python:
            llama = llama_cpp.Llama(args.llama_python, file, threads, args.decode)
            llama.benchmark(prompt)
            runs[peer] = []
        for _ in range(args.rounds):
            for name, path in made.items():
                workers = BundleWorkers(path, workers=1, threads=threads)
                runs[name].append(workers.benchmark(prompt))
            if llama:
                runs[peer] += [llama.benchmark(prompt) for _ in range(3)]
        if llama:
            llama.close()
        report["threads"][str(threads)] = {name: best(found) for name, found in runs.items()}
    report["ratios"] = {}
    for threads, rows in report["threads"].items():
        report["ratios"] |= ratios(rows, peer, f"{threads} thread{'s' * (threads != '1')}")
    return report


def ratios(rows: dict[str, dict[str, float]], peer: str, where: str) -> dict[str, float]:
    """Of one number of threads: a ladder beside one long prefill, and each variant beside `peer`
    where that ran."""
    slow, quick = (rows[name]["first_token_s"] for name in ("prefill 1024", "ladder"))
    found = {f"first token, prefill 1024 over ladder, {where}": round(slow / quick, 2)}
    for name in VARIANTS if peer in rows else ():
        for what, key in (("decode", "decode_tok_s"), ("first token", "first_token_s")):
            ratio = rows[name][key] / rows[peer][key]
            found[f"{what}, {name} over {peer}, {where}"] = round(ratio, 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", metavar="DIR", required=True, help="a final checkpoint")
    parser.add_argument("--quantize", choices=RECIPES, default="int8")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=2, help="each with three prompts a variant")
    parser.add_argument("--decode", type=int, default=48, metavar="TOKENS")
    parser.add_argument("--llama_python", metavar="FILE", help="a Python with llama-cpp-python")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers here")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench_bundle_") as work:
        report = measure(args, Path(work))
    for threads, rows in report["threads"].items():
        print(f"\n{threads} threads{'':22} prefill tok/s  decode tok/s  first token s")
        for name, row in rows.items():
            print(
                f"  {name:30} {row['prefill_tok_s']:12.0f} {row['decode_tok_s']:13.1f} "
                f"{row['first_token_s']:14.3f}"
            )
    print()
    for name, ratio in report["ratios"].items():
        print(f"  {name:64} {ratio:.2f}")
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main)
