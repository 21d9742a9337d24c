"""What converting a model of full size takes: time, memory, disk and size of the result.

    python benchmarks/bench_convert.py --shape phi2
    python benchmarks/bench_convert.py --shape phi1_5 --quantize int4_block32 --json convert.json

Makes a checkpoint of the exact shape with random weights (nothing is downloaded but a tokenizer),
converts and quantises it as compress_model.py does, bundles it, opens it in LiteRT-LM and lets it
write a few tokens. Peaks are resident memory of the child processes; the file's own pages count.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import phi_like

from liteguard import cli, memory
from liteguard.config import RECIPES
from liteguard.errors import WorkError
from liteguard.export import bundle, tflite, tokenizer
from liteguard.prompts import Prompt

SHAPES = {"phi1_5": "phi-1_5", "phi2": "phi-2", "tiny": None}


def architecture(shape: str):
    """The transformers config of a shape; 'tiny' is for tests."""
    if shape != "tiny":
        return memory.phi_architecture(SHAPES[shape])
    small = memory.phi_architecture("phi-1_5")
    small.hidden_size, small.intermediate_size, small.num_hidden_layers = 64, 256, 2
    small.num_attention_heads = small.num_key_value_heads = 4
    return small


class DiskUse(threading.Thread):
    """Largest sum of the files in a folder while it runs, sampled every second."""

    def __init__(self, folder: Path):
        super().__init__(daemon=True)
        self.folder, self.peak, self.done = folder, 0, threading.Event()

    def run(self) -> None:
        while not self.done.wait(1.0):
            size = 0
            for path in self.folder.rglob("*"):
                try:
                    size += path.stat().st_blocks * 512
                except OSError:
                    continue  # gone since it was listed
            self.peak = max(self.peak, size)


def measure(args: argparse.Namespace, work: Path) -> dict:
    """Make, convert, quantise, bundle and open; one row of numbers."""
    prompt = Prompt()
    model_dir = work / "merged"
    model_dir.mkdir()
    phi_like.write_tokenizer(model_dir, Path(args.cache_dir))
    parameters = phi_like.write_checkpoint(architecture(args.shape), model_dir)
    checkpoint_bytes = sum(path.stat().st_size for path in model_dir.iterdir())
    tokenizer.build_sentencepiece(model_dir, work / "tokenizer.model")
    disk = DiskUse(work)
    disk.start()
    started = time.perf_counter()
    exported = tflite.export(
        model_dir,
        work / "float.tflite",
        prefill_lengths=args.prefill,
        kv_cache_length=args.kv_cache,
        converter=args.converter,
    )
    exported_s = time.perf_counter() - started
    quantized = tflite.quantize(
        work / "float.tflite", work / "model.tflite", args.quantize, model_dir
    )
    seconds = time.perf_counter() - started
    disk.done.set()
    (work / "float.tflite").unlink()
    task = work / "model.task"
    bundled = bundle.write_task(work / "model.tflite", work / "tokenizer.model", prompt, task)
    (work / "model.tflite").unlink()
    answer = None
    if args.open:
        from liteguard.runtime.bundle import Bundle

        with Bundle(task) as opened:
            answer = opened.generate(prompt.render_question("What is asthma?"), 4)
        if not answer.tokens:
            raise WorkError("the bundle wrote nothing")
    peaks = exported["peak_memory_bytes"], quantized["peak_memory_bytes"]
    return {
        "shape": args.shape,
        "quantize": args.quantize,
        "converter": exported["converter"],
        "prefill_lengths": args.prefill,
        "kv_cache_length": args.kv_cache,
        "parameters": parameters,
        "checkpoint_gb": round(checkpoint_bytes / 1e9, 2),
        "wall_s": round(seconds, 1),
        "export_s": round(exported_s, 1),
        "quantize_s": quantized["seconds"],
        "peak_export_gb": round(peaks[0] / 1e9, 2),
        "peak_quantize_gb": round(peaks[1] / 1e9, 2),
        "peak_gb": round(max(peaks) / 1e9, 2),
        "peak_disk_gb": round((disk.peak - checkpoint_bytes) / 1e9, 1),
        "bundle_bytes": bundled["bytes"],
        "bytes_per_parameter": round(bundled["bytes"] / parameters, 4),
        "weight_bytes": quantized["weight_bytes"],
        "bundle_over_weights": round(bundled["bytes"] / quantized["weight_bytes"], 4),
        "tokens_written": answer.tokens if answer else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="phi1_5")
    parser.add_argument("--quantize", choices=RECIPES, default="int8")
    parser.add_argument("--converter", choices=("auto", "v1", "v2"), default="auto")
    parser.add_argument("--prefill", type=int, nargs="+", default=[1024], metavar="TOKENS")
    parser.add_argument("--kv_cache", type=int, default=1280, metavar="TOKENS")
    parser.add_argument("--open", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--work", metavar="DIR", help="where the large files go (default: /tmp)")
    parser.add_argument("--cache_dir", metavar="DIR", default=".cache")
    parser.add_argument(
        "--json", metavar="FILE", help="also write the numbers here, beside those of other shapes"
    )
    args = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="bench_convert_", dir=args.work))
    try:
        row = measure(args, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(f"\n{args.shape}: {row['parameters'] / 1e9:.3f} billion parameters, {args.quantize}")
    for name, value in row.items():
        print(f"  {name:20} {value}")
    if args.json:
        report = Path(args.json)
        known = json.loads(report.read_text()) if report.exists() else {}
        report.write_text(json.dumps({**known, args.shape: row}, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main)
