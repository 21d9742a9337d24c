"""What each quantisation recipe costs and gives, on a trained checkpoint.

    python benchmarks/bench_recipes.py --input final_checkpoint --json recipes_report.json

Exports the checkpoint once, quantises it with every recipe and compares each bundle with the merged
16-bit model on held-out texts and answers: size, perplexity, greedy answers, tokens/s. A recipe's
name is what compress_model.py makes of it by default; "calibrated" is an 8-bit one with
compress.calibrate=all, "min-max" a 4-bit one with compress.calibrate=false. With --smooth the 8-bit
recipes are those of compress.smooth. Each change of perplexity is over as many texts as it takes to
know it to a quarter of --tolerance, so perplexities of two rows may be of different texts; changes
are what compares. With --llama_python (a Python that has llama-cpp-python; it is no dependency of
LiteGuard) the same checkpoint runs in llama.cpp as Q8_0, Q4_0 and Q4_K_M over as many of the same
texts as the recipe that took most. The sizes of Phi-1.5 and Phi-2 are computed from their shapes
and each recipe's bits; benchmarks/bench_convert.py measures them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import llama

from liteguard import checkpoints, cli, machine, memory, models
from liteguard.config import RECIPES, Config
from liteguard.export import (
    bundle,
    calibration,
    gguf_file,
    layerwise,
    measured,
    merge,
    quantization,
    silence,
    smoothing,
    tflite,
    tokenizer,
)
from liteguard.prompts import Prompt
from liteguard.runtime.workers import BundleWorkers

MIN_MAX, CALIBRATED = ", min-max", ", calibrated"
LLAMA_KINDS = ("Q8_0", "Q4_0", "Q4_K_M")


def variants(recipes: list[str]) -> list[str]:
    """The recipes' names; each that can be calibrated a second time, as it is not by default."""
    found = []
    for name in recipes:
        found.append(name)
        if kind := quantization.chosen_format(name):
            found.append(name + (MIN_MAX if kind.bits == 4 else CALIBRATED))
    return found


def recipe_of(variant: str) -> str:
    """The recipe that a variant is one of."""
    return variant.removesuffix(MIN_MAX).removesuffix(CALIBRATED)


def calibrates(variant: str) -> bool | str:
    """`compress.calibrate` for a variant."""
    return not variant.endswith(MIN_MAX) and ("all" if variant.endswith(CALIBRATED) else True)


def phi_bytes(shape: str, recipe: str) -> int:
    """Bytes of a Phi model's weights, scales and biases in a recipe."""
    config = memory.phi_architecture(shape)
    shapes = [parameter.shape for parameter in models.meta_model(config).parameters()]
    return quantization.expected_bytes(shapes, recipe, config.to_dict())


def measure(args: argparse.Namespace, work: Path) -> dict:
    """One row of numbers a recipe."""
    record = checkpoints.read_stage(Path(args.input), "safety")
    config = Config.model_validate(record.config)
    section = config.compress.verify
    section.questions, section.requests, section.texts = args.rows, 3, args.rows
    section.max_new_tokens = args.tokens
    own = models.load_base_tokenizer(config).backend_tokenizer
    data_dir = Path(args.data or record.data_dir)
    samples = measured.collect_samples(config, data_dir, own)
    base, _ = models.base_model(config)
    merged, exact, file = work / "merged", work / "float.tflite", work / "model.tflite"
    merge.merge_adapter(base, Path(args.input), merged, config.prompt)
    rows = layerwise.training_rows(config, data_dir, merged, calibration.WITHOUT_ROWS)
    if args.smooth and rows and smoothing.smooth(merged, rows, work / "smoothed")["layers"]:
        merged = work / "smoothed"
    vocabulary = tokenizer.build_sentencepiece(merged, work / "tokenizer.model")
    silenced = silence.Silence.of(vocabulary, merged)
    tflite.export(
        merged,
        exact,
        prefill_lengths=config.compress.ladder,
        kv_cache_length=config.compress.kv_cache_length,
        progress=None,
    )
    reference = measured.Reference(merged, config.prompt, samples, work / "merged.jsonl", silenced)
    report = {"tolerance": args.tolerance, "smoothed": args.smooth, "recipes": {}}
    question = config.prompt.render_question(samples.questions[0])
    for variant in (names := variants(args.recipes)):
        recipe, config.compress.calibrate = recipe_of(variant), calibrates(variant)
        folder = calibration.folder(work, recipe, config)
        how = {}
        if folder:
            parts = merged, rows, recipe, folder
            how = machine.in_child("calibrate", calibration.calibrate, *parts)
        made = tflite.quantize(exact, file, recipe, merged, folder, progress=None)
        task = work / f"{variant}.task"
        bundle.write_task(file, work / "tokenizer.model", config.prompt, task, silenced)
        found, exact_model, change = measured.measure_bundle(
            BundleWorkers(task, workers=1),
            reference,
            section,
            report["tolerance"],
            work / f"{variant}.jsonl",
        )
        answers = list(zip(found.answers, exact_model.answers, strict=True))[: args.rows]
        report["recipes"][variant] = {
            "megabytes": round(made["file_bytes"] / 1e6, 1),
            "perplexity": round(found.perplexity, 3),
            "merged_perplexity": round(exact_model.perplexity, 3),
            "change": round(change.change, 5),
            "error": round(change.error, 5),
            "texts": change.pairs,
            "tokens": change.tokens,
            "same_answers": sum(a["text"] == b["text"] for a, b in answers),
            "answers": len(answers),
            "phi1_5_gb": round(phi_bytes("phi-1_5", recipe) / 1e9, 2),
            "phi2_gb": round(phi_bytes("phi-2", recipe) / 1e9, 2),
            "calibration": how,
        }
        print(f"{variant}: {report['recipes'][variant]}", flush=True)
    if args.llama_python:
        pairs = max(row["texts"] for row in report["recipes"].values())
        exact_scores = reference.measured(pairs).scores
        report["llama_cpp"] = beside_llama(
            args.llama_python, merged, config.prompt, samples.pairs[:pairs], exact_scores, own, work
        )
    # Speeds last and in turns: on a shared machine a recipe's minutes are not another's.
    speeds: dict[str, list[dict[str, float]]] = {variant: [] for variant in names}
    for _ in range(args.rounds):
        for variant, runs in speeds.items():
            workers = BundleWorkers(work / f"{variant}.task", workers=1)
            runs.append(workers.benchmark(question))
            report["recipes"][variant]["peak_rss_gb"] = round(workers.peak_rss_gb, 2)
    for variant, runs in speeds.items():
        row = report["recipes"][variant]
        row["decode_tok_s"] = round(max(run["decode_tok_s"] for run in runs), 1)
        row["first_token_s"] = round(min(run["first_token_s"] for run in runs), 3)
    return report


def beside_llama(
    python: str,
    merged: Path,
    prompt: Prompt,
    pairs: list[tuple[str, str]],
    exact: list[tuple[float, int]],
    own: Any,
    work: Path,
) -> dict[str, dict[str, float]]:
    """Size and change of perplexity of the merged model in llama.cpp's own formats.

    `exact` are the merged model's scores of the pairs, `own` its tokenizer: llama.cpp scores those
    ids, and how many texts it gives the same ids is told.
    """
    whole = work / "f16.gguf"
    gguf_file.write(merged, prompt, whole, matrices="F16")

    def ids(text: str) -> list[int]:
        return own.encode(text, add_special_tokens=False).ids

    found = {}
    for kind in ("F16", *LLAMA_KINDS):
        file = whole if kind == "F16" else work / f"{kind}.gguf"
        if kind != "F16":
            llama.quantize(python, whole, file, kind)
        engine = llama.Llama(python, file, 2, 0)
        given = [(ids(context), ids(target)) for context, target in pairs]
        scores = [(engine.score(*pair), len(pair[1])) for pair in given]
        read = [engine.tokenize(context) for context, _ in pairs]
        same = sum(one == other for one, (other, _) in zip(read, given, strict=True))
        engine.close()
        change = measured.perplexity_change(scores, exact)
        found[f"llama.cpp {kind}"] = {
            "megabytes": round(file.stat().st_size / 1e6, 1),
            "change": round(change.change, 5),
            "error": round(change.error, 5),
            "texts": change.pairs,
            "same_ids": same,
        }
        print(f"llama.cpp {kind}: {found[f'llama.cpp {kind}']}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", metavar="DIR", required=True, help="a final checkpoint")
    parser.add_argument("--data", metavar="DIR", help="default: the data it was trained on")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES)
    parser.add_argument("--rows", type=int, default=16, help="texts, answers to score, questions")
    parser.add_argument("--tokens", type=int, default=24, help="most tokens of an answer")
    parser.add_argument("--rounds", type=int, default=2, help="of three timed answers a recipe")
    parser.add_argument(
        "--smooth", action="store_true", help="move outliers first; with --recipes of 8 bits only"
    )
    parser.add_argument(
        "--tolerance", type=float, default=0.01, help="four standard errors of a change"
    )
    parser.add_argument("--llama_python", metavar="FILE", help="a Python with llama-cpp-python")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers here")
    args = parser.parse_args()
    args.recipes = args.recipes or list(RECIPES)
    if args.smooth and (four := [name for name in args.recipes if name in quantization.BLOCKS]):
        parser.error(f"--smooth: {', '.join(four)} are never smoothed; name others by --recipes")
    with tempfile.TemporaryDirectory(prefix="bench_recipes_") as work:
        report = measure(args, Path(work))
    print(
        f"\ntexts until a change is known to {report['tolerance'] / 4:.2%}\n"
        f"{'recipe':28}     MB  perplexity   change     +-  same answers  tokens/s  first token"
        "  Phi-1.5 GB  Phi-2 GB"
    )
    for name, row in report["recipes"].items():
        print(
            f"{name:28} {row['megabytes']:6.1f} {row['perplexity']:11.3f} {row['change']:+8.2%} "
            f"{row['error']:6.2%} {row['same_answers']:6} of {row['answers']:<3} "
            f"{row['decode_tok_s']:8.1f} {row['first_token_s']:10.2f} s "
            f"{row['phi1_5_gb']:11.2f} {row['phi2_gb']:9.2f}"
        )
    for name, row in report.get("llama_cpp", {}).items():
        print(
            f"{name:28} {row['megabytes']:6.1f} {'':11} {row['change']:+8.2%} {row['error']:6.2%}"
        )
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main)
