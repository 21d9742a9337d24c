"""Measure checkpoints and bundles on held-out rows that no stage trained on, and compare them.

    python evaluate_model.py --checkpoint final_checkpoint
    python evaluate_model.py --bundle liteguard_phi2.task
    python evaluate_model.py --base --checkpoint domain_checkpoint final_checkpoint --bundle x.task
    python evaluate_model.py --base --model_type smollm2
    python evaluate_model.py --checkpoint final_checkpoint --limit 8 --output quick_look
    python evaluate_model.py --compare base domain instruction final bundle --markdown table.md

Perplexity on held-out domain text; ROUGE and BLEU on held-out questions, about diseases whose texts
were trained on (seen) and about others; accuracy on public benchmarks by log-likelihood; the share
of harmful and of ordinary requests that is refused (both matter: a model that refuses everything is
as bad); 95 % intervals. Checkpoints are measured as they are deployed: adapter merged, base not
quantised. Writes evaluation/<name>.json with every answer, and reuses it while nothing it depends
on has changed; an interrupted run goes on where it was. Training rows among the test rows are
reported. --limit N measures N rows of every set, --full every held-out row, instead of as many as
the YAML's `evaluate` section says.

A checkpoint goes into the lm-evaluation-harness as it is (pip install "lm-eval[hf]"; base model and
data come from the hub):

    lm_eval --model hf --model_args pretrained=microsoft/phi-2,peft=final_checkpoint --tasks medmcqa

--compare takes results (files, or names of results in --output), prints one table of them, writes
it with plots, answers side by side and the data's manifest to report.html, and MODEL_CARD.md.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

from liteguard import checkpoints, cli, machine, registry
from liteguard.errors import UserError
from liteguard.rows import read_manifest
from liteguard.wheels import WHEELS

# Changes when a result of an older version lacks what this one reads.
FORMAT = 6


def parse_args():
    parser = cli.parser(__doc__)
    cli.add_model_flags(parser)
    parser.add_argument(
        "--checkpoint", metavar="DIR", nargs="+", default=[], help="finished stages"
    )
    parser.add_argument("--bundle", metavar="FILE", help="a .task or .litertlm file")
    parser.add_argument("--base", action="store_true", help="the base model without adapter")
    parser.add_argument("--data", metavar="DIR", help="default: the data the model was trained on")
    parser.add_argument("--output", metavar="DIR", default="evaluation")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--limit", metavar="N", type=int, help="N rows of every set: a quick look")
    size.add_argument("--full", action="store_true", help="every held-out row")
    parser.add_argument("--compare", metavar="RESULT", nargs="+", help="results to compare")
    parser.add_argument("--markdown", metavar="FILE", help="with --compare: the table as Markdown")
    parser.add_argument("--json", metavar="FILE", help="with --compare: the table as JSON")
    return parser.parse_args()


def main() -> None:
    # 1. Configuration
    args = parse_args()
    if args.compare:
        compare(args)
        return
    if args.markdown or args.json:
        raise UserError("--markdown and --json write a comparison: they need --compare RESULT ...")
    records = {path: checkpoints.read_stage(Path(path)) for path in args.checkpoint}
    if args.bundle:
        records[args.bundle] = read_bundle_record(Path(args.bundle))
    if not records and not args.base:
        raise UserError("Say what to measure: --checkpoint DIR ..., --bundle FILE, or --base.")
    parent = next(iter(records.values()), None)
    config = cli.resolve_config(args, parent=None if args.model_type or args.model else parent)
    if parent is not None:
        cli.follow_stage(parent)
    for path, record in records.items():
        if record["prompt"] != config.prompt.model_dump():
            raise UserError(f"{path} was made with another prompt than the configuration in use.")
    if args.limit is not None:
        config = evaluate_fewer(config, args.limit)
    targets = targets_by_label(args.base, records)
    output = cli.output_directory(args.output)
    cli.print_config(config, "evaluate")

    # 2. Inputs
    from liteguard import models
    from liteguard.evaluation import answerers, contamination, held_out, llm_judge, run, summary
    from liteguard.evaluation.journal import Journal

    if config.evaluate.llm_judge:
        llm_judge.Judge(config.evaluate.llm_judge)  # is its key there?
    base = architecture = None
    if args.base or args.checkpoint:  # a bundle needs no base model
        directory, commit, architecture = models.model_config(config)
        base = models.base_identity(directory, commit)
    for path, record in records.items():
        trained_from = record.get("base_identity") or record["inputs"]["base"]
        if base not in (None, trained_from):
            raise UserError(
                f"{path} was trained on another base model ({trained_from[:24]}...) than "
                f"{config.model.name} is here ({base[:24]}...)."
            )
    data_dir = Path(args.data or (parent["data_dir"] if parent else f"data/{config.model_type}"))
    rows = held_out.held_out(config, data_dir, everything=args.full)
    manifest = read_manifest(data_dir)
    counts = ", ".join(f"{len(found)} {name}" for name, found in rows.items())
    print(f"{config.evaluate.split} rows: {counts}")
    split = f"{config.evaluate.split}.jsonl"
    inputs, trained_on = {}, {}
    for label, path in targets.items():
        trained_on[label] = contamination.training_data(data_dir, records.get(path))
        directories, unchecked = trained_on[label]
        inputs[label] = {
            "format": FORMAT,
            "model": records[path]["files"] if path else config.model.model_dump(),
            "base": None if path == args.bundle and path else base,
            "rows": {n: h for n, h in manifest["files"].items() if n.endswith(split)},
            "trained_on": [contamination.train_files(directory) for directory in directories],
            "unchecked": unchecked,
            # The batch size may be lowered after a crash for lack of memory.
            "evaluate": config.evaluate.model_dump(exclude={"batch_size"}),
            "counts": {name: len(found) for name, found in rows.items()},
            "benchmarks": benchmark_files() if config.evaluate.knowledge_rows else None,
            "prompt": config.prompt.model_dump(),
        }
        if args.limit is not None and not args.overwrite:
            keep_longer_runs(output, label, inputs[label])
    if args.overwrite or not all(reuse(output / f"{n}.json", inputs[n]) for n in targets):
        bundle = Path(args.bundle) if args.bundle else None
        needed, pages = answerers.expected_memory(config, architecture, bundle)
        print(
            f"expected peak memory: {(needed + pages) / 1e9:.1f} GB at most; {needed / 1e9:.1f} GB "
            "must be free"
        )
        less = "; a smaller evaluate.batch_size needs less for a checkpoint."
        machine.require_memory(needed, "evaluating", less)
    if args.dry_run:
        print(f"would measure: {', '.join(targets)}\ndry run: nothing written")
        return

    # 3. Work
    output.mkdir(parents=True, exist_ok=True)
    results, leaks = {}, {}
    for label, path in targets.items():
        file = output / f"{label}.json"
        results[label] = None if args.overwrite else reuse(file, inputs[label])
        if results[label]:
            print(f"{label}: {file} is up to date: reused")
            continue
        print(f"{label}: measuring {path or config.model.name}")
        journal = Journal(output / f"{label}.partial.jsonl", inputs[label])
        source = partial(answerers.open_answerer, config, Path(path) if path else None)
        run.collect(source, config, rows, journal)
        run.ask_judge(config, rows, journal)
        directories, unchecked = trained_on[label]
        key = tuple(directories)
        if key not in leaks:
            everything = held_out.held_out(config, data_dir, everything=True)
            leaks[key] = contamination.contamination(everything, rows, directories)
        results[label] = {
            **summary.summarise(config, rows, journal),
            "contamination": {**leaks[key], "unchecked": unchecked},
            "cost": run.run_cost(journal),
            "model": {"name": config.model.name, "path": path, "data_dir": str(data_dir)},
            "inputs": inputs[label],
        }
        checkpoints.write_json(file, results[label])
        journal.remove()

    # 4. Results
    from liteguard.evaluation import comparison

    written = ", ".join(str(output / f"{label}.json") for label in results)
    print(f"\n{comparison.comparison_text(results)}\n\nwrote {written}")
    print(f"next: python evaluate_model.py --output {output} --compare {' '.join(results)}")


def compare(args) -> None:
    """The table, report.html and MODEL_CARD.md of finished results."""
    from liteguard.evaluation import comparison, report

    output = cli.output_directory(args.output)
    beside = [
        cli.output_directory(str(Path(file).parent)) for file in (args.markdown, args.json) if file
    ]
    results = comparison.read_results(args.compare, output)
    print(comparison.comparison_text(results))
    if args.dry_run:
        print("dry run: nothing written")
        return
    for directory in (output, *beside):
        directory.mkdir(parents=True, exist_ok=True)
    written = report.write_report(results, output, args.markdown, args.json)
    print(f"\nwrote {', '.join(map(str, written))}")


def targets_by_label(base: bool, records: dict[str, dict]) -> dict[str, str | None]:
    """Label of a result -> what is measured; the base model has no path."""
    found: dict[str, str | None] = {"base": None} if base else {}
    for path, record in records.items():
        label = "final" if record["stage"] == "safety" else record["stage"]
        if label in found:
            raise UserError(
                f"{found[label]} and {path} would both be written to {label}.json.\n"
                "Measure them one by one, each with its own --output; --compare takes files."
            )
        found[label] = path
    return found


def benchmark_files() -> str:
    """sha256 of the files that hold the public questions."""
    wheels = {registry.BENCHMARKS[name][0] for name in registry.MULTIPLE_CHOICE}
    return ",".join(sorted(WHEELS[name].sha256 for name in wheels))


def keep_longer_runs(output: Path, label: str, inputs: dict) -> None:
    """A quick look must not take the place of a result, or of the answers of a run cut short."""
    from liteguard.evaluation.journal import Journal

    file, journal = output / f"{label}.json", output / f"{label}.partial.jsonl"
    if reuse(file, inputs):
        return  # and nothing will be measured
    if file.is_file():
        found = file
    elif Journal.begun_from_others(journal, inputs):
        found = journal
    else:
        return
    raise UserError(
        f"{found} was measured with other settings, and --limit would replace it.\n"
        "Choose another --output (quick_look, say), or pass --overwrite."
    )


def evaluate_fewer(config, limit: int):
    """The configuration with `limit` rows of every set; benchmarks that are off stay off."""
    if limit < 1:
        raise UserError(f"--limit {limit}: at least 1, e.g. --limit 8 for a quick look")
    section = config.evaluate
    names = ["perplexity_rows", "question_rows", "seen_question_rows", "harmful_rows"]
    rows = dict.fromkeys([*names, "benign_rows"], limit)
    rows["knowledge_rows"] = limit if section.knowledge_rows else 0
    fewer = config.model_copy(update={"evaluate": section.model_copy(update=rows)})
    fewer._sources = config.sources | {f"evaluate.{name}": "--limit" for name in rows}
    return fewer


def read_bundle_record(bundle: Path) -> dict:
    """The record that compress_model.py writes beside a bundle, its sha256 checked."""
    record_path = bundle.with_name(f"{bundle.name}.json")
    if not bundle.is_file() or not record_path.is_file():
        raise UserError(
            f"{bundle} or its record {record_path.name} is missing.\n"
            f"Make both with: python compress_model.py --input final_checkpoint --output {bundle}"
        )
    try:
        record = json.loads(record_path.read_text(encoding="utf-8"))
        described = record["files"].get(bundle.name), record["inputs"]["base"], record["stage"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{record_path} is damaged ({error!r}).") from None
    if checkpoints.sha256_file(bundle) != described[0]:
        raise UserError(
            f"{bundle} is not the file that {record_path.name} describes. A bundle and its record "
            "keep the names that compress_model.py gave them."
        )
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
