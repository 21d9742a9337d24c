"""Turn the final checkpoint into a bundle for a phone, and prove that the bundle answers.

    python compress_model.py --input final_checkpoint --output liteguard_phi2.task
    python compress_model.py --input final_checkpoint --output liteguard_phi2.task --dry_run

Merges the adapter into the 16-bit base model on the CPU, converts to TFLite with 8-bit weights
(litert-torch), builds a SentencePiece model with the same token ids, bundles both as a MediaPipe
.task file, opens the bundle in LiteRT-LM and asks it held-out questions. The bundle gets its final
name only if it can be opened, stops by itself and answers with plain text. Writes the bundle and
a record beside it (NAME.task.json).
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

from liteguard import checkpoints, cli, datasets, models, sources, training
from liteguard.errors import UserError


def parse_args():
    parser = cli.parser(__doc__)
    parser.add_argument("--input", metavar="DIR", required=True, help="a final checkpoint")
    parser.add_argument("--output", metavar="FILE", help="default: liteguard_<model_type>.task")
    return parser.parse_args()


def main() -> None:
    # 1. Configuration
    args = parse_args()
    started = time.time()
    source = Path(args.input)
    record = checkpoints.read_stage(source, "safety")
    config = cli.resolve_config(args, parent=record)
    section = config.compress
    output = Path(args.output or f"liteguard_{config.model_type}.task")
    if output.suffix != ".task":
        raise UserError(f"--output {output}: the bundle's name must end in .task")
    cli.print_config(config, "model", "compress")

    # 2. Inputs
    base, _ = sources.base_model(config)
    identity = models.base_identity(base, models.model_config(config)[2])
    if identity != record["base_identity"]:
        raise UserError(f"{source} was trained on another base model than {config.model.name}.")
    if config.prompt.model_dump() != record["prompt"]:
        raise UserError(f"{source} was trained with another prompt than the configuration in use.")
    test = datasets.load_split(Path(record["data_dir"]), "instruction", "test")
    questions = [r["prompt"] for r in training.balanced(test, "kind", section.verify_questions)]
    inputs = {
        "adapter": record["files"]["adapter_model.safetensors"],
        "base": identity,
        "prompt": record["prompt"],
        **{f"compress.{key}": value for key, value in section.model_dump().items()},
    }
    record_name = f"{output.name}.json"
    if args.dry_run:
        print(
            f"would merge, convert ({section.recipe}) and verify {output}\ndry run: nothing written"
        )
        return
    if not args.overwrite and reuse(output, record_name, inputs):
        print(f"{output} is finished and was made from the same inputs: reused")
        return
    work = start_work(output, inputs, args.overwrite)

    # 3. Work
    from liteguard.export import bundle, merge, tflite, tokenizer, verify

    timings = {}

    def step(name, function, *positional, **named):
        print(f"{name} ...")
        begin = time.time()
        result = function(*positional, **named)
        timings[name] = round(time.time() - begin, 1)
        print(f"  {name}: {timings[name]:.0f} s")
        return result

    # Steps that an interrupted run finished are complete files under their own names.
    merged_dir, tflite_file = work / "merged", work / "model.tflite"
    if not (merged_dir / "export.json").is_file():
        shutil.rmtree(merged_dir, ignore_errors=True)
        merged = step("merge", merge.merge_adapter, base, source, merged_dir, config.prompt)
        vocabulary = step(
            "tokenizer", tokenizer.build_sentencepiece, merged_dir, work / "tokenizer.model"
        )
        # Tokens that the device cannot show as text must never be written.
        silenced = step(
            "silence",
            merge.silence_tokens,
            merged_dir,
            vocabulary.silenced,
            vocabulary.single_bytes,
        )
        facts = {"merge": merged, "tokenizer": vocabulary.to_dict(), "silence": silenced}
        checkpoints.write_json(merged_dir / "export.json", facts)
    facts = json.loads((merged_dir / "export.json").read_text(encoding="utf-8"))
    if not (work / "conversion.json").is_file():
        facts["conversion"] = step(
            "convert",
            tflite.convert,
            merged_dir,
            tflite_file,
            recipe=section.recipe,
            prefill_lengths=section.prefill_lengths,
            kv_cache_length=section.kv_cache_length,
            converter=section.converter,
        )
        checkpoints.write_json(work / "conversion.json", facts["conversion"])
    facts["conversion"] = json.loads((work / "conversion.json").read_text(encoding="utf-8"))
    bundled = step(
        "bundle",
        bundle.write_task,
        tflite_file,
        work / "tokenizer.model",
        config.prompt,
        work / output.name,
    )
    verified = step(
        "verify",
        verify.verify_bundle,
        work / output.name,
        config.prompt,
        questions,
        max_new_tokens=section.verify_max_new_tokens,
        tokenizer_dir=merged_dir,
    )

    # 4. Results
    digest = checkpoints.sha256_file(work / output.name)
    result = {
        "stage": "bundle",
        "base_model": config.model.name,
        "base_licence": config.model.licence,
        "parent": str(source),
        "data_dir": record["data_dir"],
        "prompt": config.prompt.model_dump(),
        "config": config.model_dump(),
        "inputs": inputs,
        "files": {output.name: digest},
        "bytes": (work / output.name).stat().st_size,
        **facts,
        "bundle": bundled,
        "verify": verified,
        "timings_s": timings,
        "wall_s": round(time.time() - started, 1),
        "peak_rss_gb": training.peak_rss_gb(),
    }
    publish(work, output, record_name, result)
    print(f"wrote {output} ({result['bytes'] / 1e6:.0f} MB) and {record_name}")
    print(f"next: python evaluate_model.py --bundle {output}")


def reuse(output: Path, record_name: str, inputs: dict) -> bool:
    """Whether `output` is a complete bundle made from `inputs`; other inputs are an error."""
    record_path = output.with_name(record_name)
    if not output.exists():
        return False
    try:
        record = json.loads(record_path.read_text(encoding="utf-8"))
        whole = checkpoints.sha256_file(output) == record["files"][output.name]
    except (OSError, ValueError, KeyError):
        whole = False
    if not whole:
        raise UserError(
            f"{output} exists, but is not a bundle that {record_name} describes. Choose another "
            "--output, or pass --overwrite to replace it."
        )
    changes = checkpoints.describe_changes(record["inputs"], json.loads(json.dumps(inputs)))
    if changes:
        raise UserError(
            f"{output} was made from other inputs:\n"
            + "\n".join(changes)
            + "\nChoose another --output, or pass --overwrite to replace it."
        )
    return True


def start_work(output: Path, inputs: dict, overwrite: bool) -> Path:
    """The work directory; what an interrupted run left there is kept if its inputs were these."""
    work = checkpoints.work_directory(output)
    known = work / checkpoints.INPUTS
    inputs = json.loads(json.dumps(inputs))
    if overwrite or not known.is_file() or json.loads(known.read_text()) != inputs:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        checkpoints.write_json(known, inputs)
    return work


def publish(work: Path, output: Path, record_name: str, record: dict) -> None:
    """Give the record, then the bundle, its final name, and drop the intermediate files.

    The old bundle goes first: a new record never stands beside an old bundle.
    """
    output.unlink(missing_ok=True)
    checkpoints.write_json(output.with_name(record_name), record)
    os.replace(work / output.name, output)
    shutil.rmtree(work)


if __name__ == "__main__":
    cli.run(main)
