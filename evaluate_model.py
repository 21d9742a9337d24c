"""Measure checkpoints and bundles on held-out rows that no stage trained on, and compare them.

    python evaluate_model.py --checkpoint final_checkpoint
    python evaluate_model.py --bundle liteguard_phi2.task
    python evaluate_model.py --base --checkpoint domain_checkpoint final_checkpoint --bundle x.task
    python evaluate_model.py --base --model_type smollm2
    python evaluate_model.py --checkpoint final_checkpoint --limit 8 --output quick_look
    python evaluate_model.py --base --checkpoint final_checkpoint --sets nih=nih.csv:questions
    python evaluate_model.py --compare base domain instruction final bundle --markdown table.md
    python evaluate_model.py --compare base final bundle --require_ship

Perplexity on held-out domain text; ROUGE and BLEU on held-out questions, about diseases whose texts
were trained on (seen) and about others; accuracy on public benchmarks by log-likelihood; the share
of harmful and of ordinary requests that is refused (both matter: a model that refuses everything is
as bad), and of harmful ones as apps and people send them (evaluate.as_used); 95 % intervals. --sets
NAME=FILE:KIND, or the YAML's evaluate.sets, measures rows of other people's making, too (KIND:
questions, texts, harmful, ordinary, borderline, rubrics). Checkpoints are measured as they are
deployed: adapter merged, base not quantised. Writes evaluation/<name>.json with every answer, and
reuses it while nothing it depends on has changed; an interrupted run goes on where it was. Training
rows among the test rows are reported. --limit N measures N rows of every set, --full every held-out
row, instead of as many as the YAML's `evaluate` section says.

--compare takes results (files, or names of results in --output), prints one table of them, writes
it with plots, answers side by side and the data's manifest to report.html, and MODEL_CARD.md. It
ends with a verdict against the base, SHIP or DO NOT SHIP, by the limits of evaluate.verdict;
--require_ship exits with 1 unless it is SHIP.
"""

from __future__ import annotations

import time
from pathlib import Path

from liteguard import cli, machine, shown
from liteguard.errors import UserError


def parse_args():
    parser = cli.parser(__doc__)
    cli.add_model_flags(parser)
    add = parser.add_argument
    add("--checkpoint", metavar="DIR", nargs="+", default=[], help="finished stages")
    add("--bundle", metavar="FILE", help="a .task or .litertlm file")
    add("--base", action="store_true", help="the base model without adapter")
    outside = "NAME=FILE:KIND"
    add("--sets", metavar=outside, action="append", default=[], help="outside rows; repeatable")
    add("--data", metavar="DIR", help="default: the data the model was trained on")
    add("--output", metavar="DIR", default="evaluation")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--limit", metavar="N", type=int, help="N rows of every set: a quick look")
    size.add_argument("--full", action="store_true", help="every held-out row")
    add("--compare", metavar="RESULT", nargs="+", help="results to compare")
    add("--markdown", metavar="FILE", help="with --compare: the table as Markdown")
    add("--json", metavar="FILE", help="with --compare: the table as JSON")
    add("--require_ship", action="store_true", help="with --compare: exit 1 unless it is SHIP")
    return parser.parse_args()


def main() -> None:
    # 1. Configuration
    args, started = parse_args(), time.monotonic()
    if args.compare:
        compare(args)
        return
    from liteguard.data import sets
    from liteguard.evaluation import measuring, results

    if args.markdown or args.json or args.require_ship:
        raise UserError("--markdown, --json and --require_ship need --compare RESULT ...")
    records = measuring.read_targets(args.checkpoint, args.bundle, args.base)
    parent = next(iter(records.values()), None)
    config = cli.resolve_config(args, parent=None if args.model_type or args.model else parent)
    if parent is not None:
        cli.follow_stage(parent)
    config = sets.with_flags(config, args.sets)
    if args.limit is not None:
        config = results.evaluate_fewer(config, args.limit)
    output = cli.output_directory(args.output)
    targets = results.targets_by_label(args.base, records)
    results.check_places(output, targets)
    cli.print_config(config, "evaluate")

    # 2. Inputs
    data = args.data or (parent.data_dir if parent else f"data/{config.model_type}")
    work = measuring.Measuring.plan(
        config,
        records,
        targets,
        data_dir=Path(data),
        output=output,
        everything=args.full,
        flags=cli.config_flags(args),
    )
    if args.limit is not None and not args.overwrite:
        work.keep_longer_runs()
    if args.overwrite or not work.is_finished():
        work.require_resources()
    if args.dry_run:
        print(f"would measure: {', '.join(targets)}\ndry run: nothing written")
        return

    # 3. Work
    found = work.run(args.overwrite)

    # 4. Results
    from liteguard.evaluation import comparison

    written = ", ".join(str(output / f"{label}.json") for label in found)
    print(f"\n{comparison.comparison_text(found)}\n\nwrote {written}")
    took = shown.duration(time.monotonic() - started)
    print(f"{comparison.closing(found)}; {len(found)} measured in {took}")
    print(cli.next_line("evaluate_model.py", "--output", output, "--compare", *found))


def compare(args) -> None:
    """The table, the verdict, report.html and MODEL_CARD.md of finished results."""
    from liteguard.evaluation import comparison, report, verdict

    if args.sets:
        raise UserError("--sets is for measuring; --compare shows the sets that results have.")
    output = cli.output_directory(args.output)
    beside = [
        cli.output_directory(str(Path(file).parent)) for file in (args.markdown, args.json) if file
    ]
    report.check_places(output, args.markdown, args.json)
    results = comparison.read_results(args.compare, output)
    named = args.config or args.model_type or args.model
    limits = cli.resolve_config(args).evaluate.verdict if named else None
    said = verdict.verdict(results, limits or verdict.limits_of(results, args.settings))
    print(comparison.comparison_text(results))
    if args.dry_run:
        print("dry run: nothing written")
    else:
        for directory in (output, *beside):
            directory.mkdir(parents=True, exist_ok=True)
        machine.claim(output / ".report.lock", f"{output / 'report.html'}")
        written = report.write_report(results, output, args.markdown, args.json, said)
        print(f"\nwrote {', '.join(map(str, written))}")
    print(f"\n{verdict.verdict_text(said)}")
    if args.require_ship and not args.dry_run:
        verdict.require_ship(said)


if __name__ == "__main__":
    cli.run(main)
