"""What all six steps will take on this machine: memory, minutes, disk, and which GPU would do.

    python plan.py --model_type smollm2
    python plan.py --config mine.yaml --data data/mine
    python plan.py --model microsoft/phi-2 --dry_run

Memory and disk come from the model's shapes. Minutes come from a probe: five steps of each training
stage and a few rows of the evaluation, run by the real scripts on the real base model and the
prepared data, in a directory that is deleted afterwards (minutes on a CPU with a small model; as
long as 12 steps take with a large one). Without prepared data or base model it says so and gives
the rest. Nothing is downloaded, nothing is kept. --dry_run plans without the probe.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

from liteguard import cli, limits
from liteguard.errors import UserError


def parse_args() -> argparse.Namespace:
    parser = cli.parser(__doc__)
    cli.add_model_flags(parser)
    parser.add_argument("--data", metavar="DIR", help="default: data/<model_type>")
    return parser.parse_args()


def main() -> None:
    # 1. Configuration
    args = parse_args()
    config = cli.resolve_config(args)
    data_dir = Path(args.data or f"data/{config.model_type}")

    # 2. Inputs
    import torch

    from liteguard import models, planning, planning_probe
    from liteguard.checkpoints import STAGES
    from liteguard.rows import read_manifest

    cuda, cores = torch.cuda.is_available(), limits.cores()
    architecture, missing = planning.shapes(config)
    if architecture is None:
        raise UserError(
            f"{missing}, so its size is not known. Run stage 1 with --dry_run, which fetches it, "
            "or name a copy with --set model.path=DIR."
        )
    why = [missing] if missing else []
    if not missing:
        config = models.with_base_prompt(config)
    rows, lengths = None, {}
    try:
        counts = read_manifest(data_dir)["counts"]
        rows = sum(found["rows"] for found in counts.values())
    except UserError:
        why.append(f"no prepared data in {data_dir} (run prepare_datasets.py)")
    device = torch.cuda.get_device_name() if cuda else f"{cores} CPU cores"
    parameters = models.count_parameters(architecture)
    print(f"{config.model.name}, {parameters / 1e9:.2f} billion parameters, on {device}")

    # 3. Work
    speeds, measuring = {}, None
    taught: dict[str, planning_probe.Taught] = {}
    if args.dry_run:
        why.append("--dry_run was given")
    if not why:
        tokenizer = models.load_base_tokenizer(config)
        lengths = {
            stage: planning_probe.lengths_of(config, stage, data_dir, tokenizer) for stage in STAGES
        }
        with tempfile.TemporaryDirectory(prefix="liteguard_plan_") as folder:
            work = Path(folder)
            speeds = planning_probe.train(config, data_dir, work, lengths, cuda, print)
            measuring = planning_probe.measure(config, data_dir, work, print)

    # 4. Results
    slow = planning.slowness(speeds, parameters, cuda, cores) if speeds else None
    steps = [planning.prepare_step(config, rows, slow, measuring)]
    for stage in STAGES:
        steps.append(
            planning.training_step(
                config,
                stage,
                architecture,
                cuda,
                lengths.get(stage),
                speeds.get(stage),
                taught.get(stage),
            )
        )
    steps.append(planning.compress_step(config, architecture, slow))
    targets = len(STAGES) + 1
    steps.append(planning.evaluate_step(config, architecture, measuring, slow, targets))
    free_disk = shutil.disk_usage(Path()).free
    print(f"\n{planning.table(steps, limits.available_memory(), free_disk)}")
    if why:
        print(f"No probe, so no minutes: {'; '.join(why)}. Memory is that of the longest rows.")
    print("\nA GPU that would do, with what the driver takes:")
    print("\n".join(planning.cards(config, architecture)))
    output = ["--output", args.data] if args.data else []
    following = cli.next_line("prepare_datasets.py", *cli.config_flags(args), *output)
    print(f"\n{following}")


if __name__ == "__main__":
    cli.run(main)
