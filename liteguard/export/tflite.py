"""16-bit safetensors -> one quantised TFLite file with prefill and decode signatures.

The conversion (`litert_torch.generative.export_hf`) runs in a child process: its memory is given
back when it ends, TensorFlow's noise goes to a log, and a child that the kernel kills for lack of
memory becomes a message instead of the end of this process.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from liteguard import machine, shown, writing
from liteguard.config import RECIPES
from liteguard.errors import UserError, WorkError
from liteguard.export import quantization, shapes
from liteguard.runtime import container

# Peak resident memory in GB, each pair (fixed, GB per billion parameters); the smaller line counts.
# v2 (benchmarks/bench_convert.py): 2.6, 10.5 and 14.4 GB with 0.135, 1.42 and 2.78 billion; it
# streams the weights, and the pages of its files count. v1 keeps two float32 copies.
_PEAK_GB = {"v2": ((2.1, 6.1), (6.6, 3.0)), "v1": ((2.3, 13.5),)}
# The same without pages of files (benchmarks/full_size.py): 7.2 and 12.5 GB with 1.42 and 2.78.
_OWN_GB = {"v2": (1.8, 3.95), "v1": (2.3, 13.5)}
# Bytes of disk per parameter: the float32 file and the converter's copy of it.
_DISK = {"v2": 8, "v1": 9}
_STEP = re.compile(r"\((\d+:\d+)\)\s*\[\s*(START|DONE)\s*\]\s*(.*)")


def find_tensorflow(python: str | None = None) -> Path | None:
    """The folder of the TensorFlow that `python` (default: this one) would import.

    Raises UserError where that is no Python with litert-torch.
    """
    if python is None:
        spec = importlib.util.find_spec("tensorflow")
        return Path(spec.origin).parent if spec is not None and spec.origin else None
    code = (
        "import importlib.util as u, sys\n"
        "assert sys.version_info >= (3, 11), 'it is older than Python 3.11'\n"
        "assert u.find_spec('litert_torch'), 'it has no litert-torch'\n"
        "print(getattr(u.find_spec('tensorflow'), 'origin', None) or '')"
    )
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=120)
        lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
        last, failed = (lines or ["no answer"])[-1], done.returncode != 0
    except (OSError, subprocess.TimeoutExpired) as error:
        last, failed = str(error), True
    if failed:
        raise UserError(
            f"compress.python = {python} cannot run the converter: "
            f"{last.removeprefix('AssertionError: ')}\n"
            "Name the python of an environment that has the converter's packages:\n"
            "PYTHON -m pip install -r requirements-convert.txt -c constraints.txt"
        )
    return Path(last).parent if lines and last else None


def converter_available(python: str | None = None) -> Literal["v1", "v2"]:
    """The best converter that the installed TensorFlow supports.

    v2 needs `convert_mlir_bytecode`, which TensorFlow 2.21 lacks. The source is searched instead
    of imported, because importing TensorFlow costs seconds and 500 MB.
    """
    folder = find_tensorflow(python)
    if folder is None:
        return "v1"
    try:
        text = (folder / "lite" / "python" / "convert.py").read_text(encoding="utf-8")
    except OSError:
        return "v1"
    return "v2" if "def convert_mlir_bytecode" in text else "v1"


def choose_converter(
    wanted: Literal["auto", "v1", "v2"], python: str | None = None
) -> Literal["v1", "v2"]:
    """`wanted`, or the best one installed (for `python`); UserError for a v2 that is not there."""
    available = converter_available(python)
    if wanted == "v2" and available == "v1":
        raise UserError(
            "converter v2 needs a TensorFlow with convert_mlir_bytecode (tf-nightly "
            ">= 2.23.0.dev20261026); install one, or choose compress.converter: v1"
        )
    return available if wanted == "auto" else wanted


def count_parameters(model_dir: Path) -> tuple[int, int]:
    """(parameters, entries of matrices among them) in a directory's safetensors files."""
    shapes = parameter_shapes(model_dir)
    return sum(map(math.prod, shapes)), sum(math.prod(s) for s in shapes if len(s) > 1)


def parameter_shapes(model_dir: Path) -> list[list[int]]:
    """Shapes of the tensors in a directory's safetensors files; only their headers are read."""
    from safetensors import safe_open

    shapes: list[list[int]] = []
    for path in sorted(Path(model_dir).glob("*.safetensors")):
        with safe_open(str(path), framework="numpy") as tensors:
            # keys(): the handle is not iterable
            shapes += [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
    return shapes


def required_resources(parameters: int, converter: Literal["v1", "v2"]) -> tuple[int, int]:
    """(bytes of memory, bytes of disk) that must be free for the conversion of a model."""
    fixed, slope = _OWN_GB[converter]
    return int(fixed * 1e9 + slope * parameters), parameters * _DISK[converter]


def peak_memory(parameters: int, converter: Literal["v1", "v2"]) -> int:
    """Bytes of memory that the conversion shows at most, with pages that the kernel may drop."""
    lines = _PEAK_GB[converter]
    return int(min(fixed * 1e9 + slope * parameters for fixed, slope in lines))


def bundle_disk(parameters: int, recipe: str, containers: int = 2) -> int:
    """Bytes of disk for a recipe's file, its bundles, and what the proof unpacks of one.

    LiteRT-LM and the scoring model unpack a file of weights each, in 8 bits or in float32; the
    latter reads a copy of the TFLite file (Phi-2 in int8: 13.8 GB, benchmarks/full_size.py).
    """
    stored = max(quantization.BITS[recipe]) / 8
    unpacked = container.unpacked_size(stored, recipe)
    return int(parameters * ((2 + containers) * stored + 2 * unpacked))


def whole_disk(
    parameters: int, converter: Literal["v1", "v2"], recipe: str, containers: int = 2
) -> int:
    """Bytes of disk from a checkpoint to proven bundles: merged model, conversion, bundles."""
    bundles = bundle_disk(parameters, recipe, containers)
    return parameters * 2 + max(parameters * _DISK[converter], parameters * 4 + bundles)


def _check(merged_dir: Path, prefill_lengths: Sequence[int], kv_cache_length: int) -> None:
    """Everything that would otherwise fail minutes later or, worse, not fail."""
    if not list(merged_dir.glob("*.safetensors")):
        raise UserError(f"no *.safetensors in {merged_dir}: merge the adapter first")
    config_file = merged_dir / "generation_config.json"
    config = json.loads(config_file.read_text()) if config_file.exists() else {}
    if config.get("eos_token_id") is None:
        raise UserError(
            f"{config_file} has no eos_token_id: the exported model would have no stop token"
        )
    if not prefill_lengths or min(prefill_lengths) < 1:
        raise UserError(f"prefill_lengths must be positive numbers, not {list(prefill_lengths)}")
    if max(prefill_lengths) >= kv_cache_length:
        raise UserError(
            f"kv_cache_length {kv_cache_length} must exceed the longest of prefill_lengths "
            f"{list(prefill_lengths)}: prompt and answer share the cache"
        )
    model = json.loads((merged_dir / "config.json").read_text())
    longest = model.get("max_position_embeddings")
    if longest and kv_cache_length > longest:
        raise UserError(
            f"compress.kv_cache_length {kv_cache_length} exceeds the model's "
            f"max_position_embeddings {longest}"
        )


def export(
    merged_dir: Path,
    output: Path,
    *,
    prefill_lengths: Sequence[int] = (1024,),
    kv_cache_length: int = 1280,
    converter: Literal["auto", "v1", "v2"] = "auto",
    python: str | None = None,
    check_resources: bool = True,
    progress: Callable[[str], None] | None = print,
) -> dict[str, Any]:
    """Convert a merged model to one float32 TFLite file, embedder inside.

    Args:
        merged_dir: 16-bit safetensors, config, tokenizer, generation_config with eos_token_id.
        output: the `.tflite` file to write; written under another name first.
        prefill_lengths: prompt lengths in tokens, one signature each; a prompt is padded to one of
            them, so short ones make short questions fast.
        kv_cache_length: tokens of prompt and answer together.
        converter: v2 streams the weights (half the memory); auto takes it where it works.
        python: of the environment that has the converter; default: this one.
        check_resources: refuse to start without enough free memory and disk.
        progress: receives one line per step; None for silence.

    Returns:
        ``converter``, ``prefill_lengths``, ``kv_cache_length``, ``parameters``, ``matrices``
        (entries of the weight matrices), ``bytes`` (of the file), ``seconds``,
        ``peak_memory_bytes`` (of the child).

    Raises:
        UserError: the model or an argument cannot be converted, or memory or disk do not suffice.
        WorkError: the conversion failed; names the log.
    """
    merged_dir, output = Path(merged_dir).resolve(), Path(output).resolve()
    say = progress or (lambda line: None)
    _check(merged_dir, prefill_lengths, kv_cache_length)
    chosen = choose_converter(converter, python)
    parameters, matrices = count_parameters(merged_dir)
    memory, disk = required_resources(parameters, chosen)
    output.parent.mkdir(parents=True, exist_ok=True)
    if check_resources:
        require_resources(parameters, chosen, output.parent, disk)
    say(
        f"converting {parameters / 1e6:.1f} million parameters ({chosen}); expect up to "
        f"{memory / 1e9:.1f} GB of memory and {shown.size(disk)} of disk"
    )
    arguments = {
        "model": str(merged_dir),
        "prefill_lengths": list(prefill_lengths),
        "cache_length": kv_cache_length,
        "use_v2": chosen == "v2",
    }
    return {
        "converter": chosen,
        "prefill_lengths": list(prefill_lengths),
        "kv_cache_length": kv_cache_length,
        "parameters": parameters,
        "matrices": matrices,
        **_in_child("export", arguments, output, memory, say, python),
    }


def quantize(
    source: Path,
    output: Path,
    recipe: str,
    merged_dir: Path,
    calibrated: Path | None = None,
    *,
    python: str | None = None,
    progress: Callable[[str], None] | None = print,
) -> dict[str, Any]:
    """Write a float32 TFLite file of `export` with its weights in a recipe of RECIPES.

    Args:
        source: the float32 file; kept.
        output: the `.tflite` file to write; written under another name first.
        recipe: a name in `config.RECIPES`; "none" makes a second name for `source`.
        merged_dir: the model that `source` was made from.
        calibrated: folder of `calibration.calibrate`, of this model and recipe.
        python: of the environment that has the quantiser; default: this one.
        progress: receives one line per step; None for silence.

    Returns:
        ``recipe``, ``bytes``, ``seconds``, ``peak_memory_bytes`` (of the child), and what
        `quantization.stored_weights` finds.

    Raises:
        WorkError: the quantiser failed, or a weight is stored twice.
    """
    source, output = Path(source).resolve(), Path(output).resolve()
    say = progress or (lambda line: None)
    if recipe == "none":
        with writing.replacing(output) as beside:
            os.link(source, beside)
        made = {"bytes": output.stat().st_size, "seconds": 0.0, "peak_memory_bytes": 0}
    else:
        say(f"quantising to {recipe}: {RECIPES[recipe]}")
        arguments = {
            "source": str(source),
            "recipe": recipe,
            "architecture": json.loads((Path(merged_dir) / "config.json").read_text()),
            "calibrated": str(calibrated.resolve()) if calibrated else None,
        }
        # The float32 file is mapped; its pages can be given back.
        made = _in_child("quantize", arguments, output, source.stat().st_size, say, python)
    matrices = count_parameters(Path(merged_dir))[1]
    return {"recipe": recipe, **made, **quantization.check_stored_once(output, matrices, say)}


def require_resources(
    parameters: int, converter: Literal["v1", "v2"], folder: Path, disk: int
) -> None:
    """Raise UserError where memory or `disk` bytes do not suffice, with both numbers.

    The conversion is the step that needs the most memory: merging and the proof keep 16-bit
    weights, the bundle maps its own (benchmarks/full_size.py).
    """
    memory, _ = required_resources(parameters, converter)
    machine.require_memory(
        memory,
        f"converting {parameters / 1e9:.2f} billion parameters with converter {converter}",
        " (converter v2 needs a third of that)" if converter == "v1" else "",
    )
    folder = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free_disk = shutil.disk_usage(folder).free
    if free_disk < disk:
        raise UserError(
            f"the conversion needs about {shown.size(disk)} of disk in {folder} for "
            f"intermediate files, and {shown.size(free_disk)} is free"
        )


def _in_child(
    task: str,
    arguments: dict[str, Any],
    output: Path,
    memory: int,
    say: Callable[[str], None],
    python: str | None = None,
) -> dict[str, Any]:
    """Runs a task of `_child` that makes one file, and gives the file its name.

    Returns ``bytes``, ``seconds``, ``peak_memory_bytes``.
    """
    work = output.with_name(f".{output.name}.work")
    log = output.with_name(f"{output.name}.log")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    say(f"  log: {log}")
    started = time.perf_counter()
    try:
        task_and_place = {"task": task, "output_dir": str(work), **arguments}
        code = _run_child(task_and_place, log, say, python)
        result_file = work / "result.json"
        if code != 0 or not result_file.exists():
            raise WorkError(_failure(code, log, memory))
        result = json.loads(result_file.read_text())
        made = work / result["file"]
        if unknown := quantization.custom_operators(made):
            raise WorkError(
                f"the converter wrote operators that no device has: {sorted(unknown)}; its log is "
                f"{log}"
            )
        # The quantiser writes its file executable; a model is data.
        made.chmod(0o644)
        writing.flush(made)
        writing.put(made, output)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    log.unlink(missing_ok=True)
    return {
        "bytes": output.stat().st_size,
        "seconds": round(time.perf_counter() - started, 1),
        "peak_memory_bytes": result["peak_memory_bytes"],
    }


def _run_child(
    arguments: dict[str, Any],
    log: Path,
    say: Callable[[str], None],
    python: str | None = None,
) -> int:
    """Runs this module as a program; its output goes to `log`, its steps to `say`."""
    package_root = str(Path(__file__).resolve().parents[2])
    paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TF_ENABLE_ONEDNN_OPTS": "0",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        # The progress lines are wrapped to the width of the terminal otherwise.
        "COLUMNS": "250",
        "NO_COLOR": "1",
    }
    with log.open("w", encoding="utf-8") as sink:
        child = subprocess.Popen(
            [python or sys.executable, "-m", "liteguard.export.tflite", json.dumps(arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
        )
        try:
            said = ""
            for line in child.stdout or ():
                sink.write(line)
                found = _STEP.search(line)
                if found and found[2] == "START":
                    step = found[3].split(" > ")[-1].strip()
                    if step != said:  # some come twice
                        say(f"  {found[1]} {step}")
                    said = step
            return child.wait()
        except BaseException:
            child.kill()
            child.wait()
            raise


def _failure(code: int, log: Path, memory: int) -> str:
    """What to say about a child that ended with `code`."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    last = next((line.strip() for line in reversed(lines) if line.strip()), "(no output)")
    no_memory = "bad_alloc" in last or "MemoryError" in last or "ENOMEM" in last
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL) or no_memory:
        return (
            f"the conversion ran out of memory (it needs about {memory / 1e9:.1f} GB) and was "
            f"killed. Nothing was written; its log is {log}. Close other programs or add swap, "
            "and run the same command again"
        )
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return f"the conversion failed ({how}): {last}\nNothing was written; its log is {log}"


def _plain_layer_norm() -> None:
    """Makes torch's LayerNorm trace as means, products and a root.

    litert-torch 0.10 lowers `layer_norm` to a batch normalisation, which converter v2 writes with
    *custom* ops called Mean and SquaredDifference. The file converts and quantises without a
    complaint, and LiteRT-LM refuses it at the first prompt ("unresolved custom op: Mean"): every
    Phi and GPT model. Written out, it becomes built-in ops that XNNPACK runs.
    """
    import torch

    def forward(self: torch.nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
        axes = tuple(range(-len(self.normalized_shape), 0))
        centred = x - x.mean(axes, keepdim=True)
        variance = (centred * centred).mean(axes, keepdim=True)
        y = centred * torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            y = y * self.weight
        return y if self.bias is None else y + self.bias

    torch.nn.LayerNorm.forward = forward


def _export_child(arguments: dict[str, Any]) -> str:
    """Exports in this process; returns the name of the file it wrote."""
    import logging

    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    from litert_torch.generative.export_hf.export import export as export_model

    _plain_layer_norm()
    given, output = Path(arguments["model"]), Path(arguments["output_dir"])
    model = shapes.without_unreachable(given, output / "model", arguments["cache_length"])
    export_model(
        model=str(model),
        output_dir=arguments["output_dir"],
        keep_temporary_files=True,
        prefill_lengths=arguments["prefill_lengths"],
        cache_length=arguments["cache_length"],
        quantization_recipe="none",
        bundle_litert_lm=False,
        externalize_embedder=False,
        use_v2=arguments["use_v2"],
        delete_in_memory_params=arguments["use_v2"],
    )
    return "model.tflite"


def _child(arguments: dict[str, Any]) -> None:
    """The work, in the child process; writes result.json into the output folder at the end."""
    machine.die_with_parent()
    folder = Path(arguments["output_dir"])
    if arguments["task"] == "export":
        file = _export_child(arguments)
    else:
        file = "quantized.tflite"
        quantization.quantize(
            Path(arguments["source"]),
            folder / file,
            arguments["recipe"],
            arguments["architecture"],
            Path(arguments["calibrated"]) if arguments["calibrated"] else None,
        )
    if not (folder / file).exists():
        raise FileNotFoundError(f"the converter wrote no {file}")
    peak = int(machine.peak_rss_gb() * 1e9)
    writing.write_json(folder / "result.json", {"file": file, "peak_memory_bytes": peak})


if __name__ == "__main__":
    _child(json.loads(sys.argv[1]))
