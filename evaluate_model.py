"""Measure checkpoints and bundles on held-out rows that no stage trained on.

    python evaluate_model.py --checkpoint final_checkpoint
    python evaluate_model.py --bundle liteguard_phi2.task
    python evaluate_model.py --base --checkpoint domain_checkpoint final_checkpoint --bundle x.task
    python evaluate_model.py --base --model_type smollm2

Perplexity on held-out domain text; ROUGE and BLEU on held-out questions; the share of harmful and
of ordinary requests that is refused (both matter: a model that refuses everything is as bad).
Checkpoints are measured as they are deployed: adapter merged, base not quantised. Writes
evaluation/<name>.json with every answer, and reuses it while nothing it depends on has changed.
"""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path

from liteguard import checkpoints, cli, datasets
from liteguard.errors import UserError


def parse_args():
    parser = cli.parser(__doc__)
    cli.add_model_flags(parser)
    parser.add_argument("--checkpoint", metavar="DIR", nargs="+", default=[], help="stages")
    parser.add_argument("--bundle", metavar="FILE", help="a .task or .litertlm file")
    parser.add_argument("--base", action="store_true", help="the base model without adapter")
    parser.add_argument("--data", metavar="DIR", help="default: the data the model was trained on")
    parser.add_argument("--output", metavar="DIR", default="evaluation")
    return parser.parse_args()


def main() -> None:
    # 1. Configuration
    args = parse_args()
    records = {path: checkpoints.read_stage(Path(path)) for path in args.checkpoint}
    if args.bundle:
        records[args.bundle] = read_bundle_record(Path(args.bundle))
    if not records and not args.base:
        raise UserError("Say what to measure: --checkpoint DIR ..., --bundle FILE, or --base.")
    parent = next(iter(records.values()), None)
    config = cli.resolve_config(args, parent=None if args.model_type or args.model else parent)
    for path, record in records.items():
        if record["prompt"] != config.prompt.model_dump():
            raise UserError(f"{path} was made with another prompt than the configuration in use.")
    cli.print_config(config, "evaluate")

    # 2. Inputs
    from liteguard import evaluation

    data_dir = Path(args.data or (parent["data_dir"] if parent else f"data/{config.model_type}"))
    rows = evaluation.held_out(config, data_dir)
    manifest = datasets.read_manifest(data_dir)
    counts = ", ".join(f"{len(found)} {name}" for name, found in rows.items())
    print(f"{config.evaluate.split} rows: {counts}")
    targets = ([("base", None)] if args.base else []) + [
        (record["stage"] if record["stage"] != "safety" else "final", path)
        for path, record in records.items()
    ]
    if args.dry_run:
        print(
            f"would measure: {', '.join(label for label, _ in targets)}\ndry run: nothing written"
        )
        return

    # 3. Work
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    results = {}
    split = f"{config.evaluate.split}.jsonl"
    for label, path in targets:
        inputs = {
            "model": records[path]["files"] if path else config.model.model_dump(),
            "rows": {n: h for n, h in manifest["files"].items() if n.endswith(split)},
            "evaluate": config.evaluate.model_dump(),
            "prompt": config.prompt.model_dump(),
        }
        file = output / f"{label}.json"
        results[label] = reuse(file, inputs)
        if results[label]:
            print(f"{label}: {file} is up to date: reused")
            continue
        print(f"{label}: measuring {path or config.model.name}")
        started = time.time()
        journal = evaluation.Journal(output / f"{label}.partial.jsonl", inputs)
        source = partial(evaluation.open_answerer, config, Path(path) if path else None)
        cost = evaluation.collect(source, config, rows, journal)
        cost["wall_s"] = round(time.time() - started, 1)
        results[label] = evaluation.summarise(config, rows, journal) | {"cost": cost}
        checkpoints.write_json(file, results[label] | {"inputs": inputs})
        journal.close()
        journal.path.unlink()

    # 4. Results
    from liteguard.report import metrics_table

    written = ", ".join(str(output / f"{label}.json") for label in results)
    print(f"\n{metrics_table(results)}\n\nwrote {written}")


def read_bundle_record(bundle: Path) -> dict:
    """The record that compress_model.py writes beside a bundle, its sha256 checked."""
    record_path = bundle.with_name(f"{bundle.name}.json")
    if not bundle.is_file() or not record_path.is_file():
        raise UserError(
            f"{bundle} or its record {record_path.name} is missing.\n"
            f"Make both with: python compress_model.py --input final_checkpoint --output {bundle}"
        )
    record = json.loads(record_path.read_text(encoding="utf-8"))
    if checkpoints.sha256_file(bundle) != record["files"][bundle.name]:
        raise UserError(f"{bundle} is not the file that {record_path.name} describes.")
    return record


def reuse(file: Path, inputs: dict) -> dict | None:
    """An earlier result for the same inputs."""
    try:
        earlier = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return earlier if earlier.get("inputs") == json.loads(json.dumps(inputs)) else None


if __name__ == "__main__":
    cli.run(main)
