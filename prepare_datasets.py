"""Stage 0: prepare the data of all three training stages.

    python prepare_datasets.py --model_type smollm2
    python prepare_datasets.py --model_type phi2 --set data.domain.0.path=texts.jsonl

Reads the sources listed in the YAML's `data` section (hub datasets, local files, files inside
pinned wheels), cleans and de-duplicates them, and splits them by disease into train, validation and
test. Writes data/<model_type>/{domain,instruction,preference}/{train,validation,test}.jsonl and
manifest.json (counts, sha256, sources, licences). Run again, it reuses a finished directory.
"""

from __future__ import annotations

from pathlib import Path

from liteguard import checkpoints, cli, datasets, preparation, sources


def parse_args():
    parser = cli.parser(__doc__)
    cli.add_model_flags(parser)
    parser.add_argument("--output", metavar="DIR", help="default: data/<model_type>")
    return parser.parse_args()


def main() -> None:
    # 1. Configuration
    args = parse_args()
    config = cli.resolve_config(args)
    output = Path(args.output or f"data/{config.model_type}")
    print(f"prepare_datasets: {config.model.name} -> {output}")
    cli.print_config(config, "data")

    # 2. Inputs
    preparation.check_sources(config)
    wheels = sorted(
        {
            w
            for part in datasets.FIELDS
            for s in getattr(config.data, part)
            for w in datasets.DATASETS[s.dataset][2]
        }
    )
    local = {
        s.path: checkpoints.sha256_file(Path(s.path))
        for part in datasets.FIELDS
        for s in getattr(config.data, part)
        if s.path and Path(s.path).is_file()
    }
    catalogue = Path(datasets.__file__).parent / "catalogue.yaml"
    inputs = {
        "model_type": config.model_type,
        "data": checkpoints.sha256_json(config.data.model_dump(exclude={"cache_dir"})),
        "local files": local,
        "wheels": {name: sources.WHEELS[name].sha256 for name in wheels},
        "catalogue": checkpoints.sha256_file(catalogue),
    }
    for name in wheels:
        wheel = sources.WHEELS[name]
        print(
            f"  needs {wheel.requirement} ({wheel.megabytes:.1f} MB): {wheel.what}; {wheel.licence}"
        )
    if args.dry_run:
        print("dry run: nothing written")
        return

    # 3. Work
    work = checkpoints.open_work(output, inputs, args.overwrite, "manifest.json")
    if work is None:
        print(f"{output} is finished and was made from the same inputs: reused")
        return
    counts, entries = {}, []
    for part in datasets.FIELDS:
        splits, part_entries = preparation.collect(part, config)
        entries += part_entries
        (work / part).mkdir(exist_ok=True)
        for split, rows in splits.items():
            name = f"{part}/{split}.jsonl"
            preparation.write_jsonl(work / name, rows)
            counts[name] = {"rows": len(rows), "entities": len({row["entity"] for row in rows})}

    # 4. Results
    manifest = {"model_type": config.model_type, "counts": counts, "sources": entries}
    checkpoints.publish(work, output, manifest, list(counts), "manifest.json")
    print(f"\n{'file':30} {'rows':>8} {'entities':>9}")
    for name, entry in counts.items():
        print(f"{name:30} {entry['rows']:8,} {entry['entities']:9,}")
    print(f"\nwrote {output}\nnext: python train_domain.py --model {config.model.name}")


if __name__ == "__main__":
    cli.run(main)
