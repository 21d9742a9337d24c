"""The fault matrix: kills, bad inputs, two runs at once, full disks; the real scripts, tiny model.

    python benchmarks/fault_matrix.py --json benchmarks/fault_matrix_report.json
    python benchmarks/fault_matrix.py --quick          # every eighth kill, all bad inputs
    python benchmarks/fault_matrix.py --only inputs

Kills: each script is killed (SIGKILL) before every change of a file that publishing makes, and
before some of those of the work; then the same command runs again, and its result must be the one
of a run that nobody killed. Bad inputs are made from the settings' schema and from the records that
lie between the scripts: each is one message with exit code 2. Goal: 0 tracebacks, 0 accepted in
silence, 0 lost, 0 hangs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import fault_inputs
import tiny_world
from kill_points import die_after
from tiny_world import Done, Running, run

from liteguard.checkpoints import sha256_file

KINDS = ("identical", "right exit", "traceback", "silent", "lost", "hang", "wrong exit", "other")
BAD = KINDS[2:]
LONGEST = 2_000 + 20  # characters of a message
TRAINED = ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json")


@dataclass
class Tally:
    """How the cases of each part ended, and those that ended badly."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    bad: list[str] = field(default_factory=list)

    def add(self, part: str, case: str, kind: str, said: str = "") -> None:
        self.counts.setdefault(part, Counter())[kind] += 1
        if kind in BAD:
            self.bad.append(f"{part}, {case}: {kind}. {said}"[:300])
            print(f"  {self.bad[-1]}", flush=True)

    def refused(self, part: str, case: str, done: Done, allowed: tuple[int, ...] = (2,)) -> None:
        """A case that has to end in one message and one of these exit codes."""
        self.add(part, case, refusal(done, allowed), f"exit {done.code}: {done.last}")

    def table(self) -> str:
        lines = [f"{'':26}{''.join(f'{kind:>12}' for kind in KINDS)}"]
        lines += [
            f"{part:26}{''.join(f'{found[kind] or str():>12}' for kind in KINDS)}"
            for part, found in self.counts.items()
        ]
        total = sum(self.counts.values(), Counter())
        return "\n".join([*lines, f"{'all':26}{''.join(f'{total[kind]:12}' for kind in KINDS)}"])


def refusal(done: Done, allowed: tuple[int, ...]) -> str:
    """What kind of an ending that of a run is that has to be refused."""
    if done.code is None:
        return "hang"
    if done.traceback:
        return "traceback"
    if done.code not in allowed:
        return "silent" if done.code == 0 else "wrong exit"
    whole = done.code == 0 or (bool(done.err) and done.err.count("error:") == 1)
    short = len(done.err) < LONGEST + 200  # libraries may add a line of their own
    return "right exit" if whole and short else "other"


class World:
    """Everything that the cases need, made once: model, data, a finished run of every script."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.config, self.model = place / "tiny.yaml", place / "model"
        self.cache, self.data = place / "cache", place / "data"
        self.domain, self.instruction = (
            place / "domain_checkpoint",
            place / "instruction_checkpoint",
        )
        self.final, self.evaluation = place / "final_checkpoint", place / "evaluation"

    def own(self, *command: str | Path) -> list[str | Path]:
        return [*command, "--set", f"data.cache_dir={self.cache}"]

    def prepare(self, output: Path, cache: Path) -> list[str | Path]:
        flags = ("--output", output, "--set", f"data.cache_dir={cache}")
        return ["prepare_datasets.py", "--config", self.config, *flags]

    def train(self, stage: str, output: Path) -> list[str | Path]:
        start: tuple[str | Path, ...] = ("--config", self.config)
        if stage != "domain":
            parent = self.domain if stage == "instruction" else self.instruction
            start = ("--checkpoint", parent)
        flags = ("--data", self.data, "--output", output)
        return self.own(f"train_{stage}.py", *start, *flags)

    def evaluate(self, output: Path) -> list[str | Path]:
        flags = ("--checkpoint", self.final, "--data", self.data, "--output", output)
        return self.own("evaluate_model.py", *flags)

    def compress(self, output: Path) -> list[str | Path]:
        flags = ("--output", output, "--only", "task", "--verify", "none", "--quantize", "int8")
        return self.own("compress_model.py", "--input", self.final, *flags)

    def make(self) -> None:
        tiny_world.make_model(self.model)
        tiny_world.make_sources(self.place / "sources")
        tiny_world.make_config(self.config, self.model, self.place / "sources")
        steps = [self.prepare(self.data, self.cache)]
        for stage, output in (("domain", self.domain), ("instruction", self.instruction)):
            steps.append(self.train(stage, output))
        steps += [self.train("safety", self.final), self.evaluate(self.evaluation)]
        for step in steps:
            done = Running(self.place, *step).wait(600)
            if done.code != 0:
                raise SystemExit(f"{step} failed:\n{done.out[-1500:]}\n{done.err[-3000:]}")
            print(f"  {step[0]}: {done.seconds:.1f} s", flush=True)


# --- kills ----------------------------------------------------------------------------------------
def digests(directory: Path, names: tuple[str, ...] | None = None) -> dict[str, str]:
    """Name -> sha256 of a directory's files."""
    found = {str(p.relative_to(directory)): p for p in directory.rglob("*") if p.is_file()}
    return {name: sha256_file(path) for name, path in found.items() if not names or name in names}


def trained(place: Path) -> Any:
    """What of a stage must not depend on when it was killed."""
    output = place / "out"
    record = json.loads((output / "stage.json").read_text())
    losses = [
        [entry["step"], entry.get("loss"), entry.get("eval_loss")]
        for entry in json.loads((output / "log_history.json").read_text())
        if "loss" in entry or "eval_loss" in entry
    ]
    best = record["metrics"]["best_eval_loss"]
    return sorted(record["files"]), digests(output, TRAINED), losses, best


def prepared(place: Path) -> Any:
    return digests(place / "out")


def measured(place: Path) -> Any:
    found = json.loads((place / "out/final.json").read_text())
    answers = [{k: v for k, v in answer.items() if k != "seconds"} for answer in found["answers"]]
    return found["perplexity"], found["scores"], answers, sorted(p.name for p in place.rglob("*"))


def converted(place: Path) -> Any:
    """The members of the bundle, and what an app is told of it, whose hashes are of the file."""
    told = json.loads((place / "out.deploy.json").read_text())
    record = json.loads((place / "out.task.json").read_text())
    whole = record["files"] == digests(place, ("out.task",))
    whole &= told.pop("bundles")["out.task"]["sha256"] == record["files"]["out.task"]
    with zipfile.ZipFile(place / "out.task") as file:
        members = {name: hashlib.sha256(file.read(name)).hexdigest() for name in file.namelist()}
    return whole, members, told


@dataclass
class Killing:
    """One script that is killed: its command with the output `place/out`, and what must be equal.

    setup: puts there what was there before. begin: killed before it, the state is kept, and all
    kills but a few start from it ("" for none): what comes before is work that takes long.
    """

    name: str
    command: list[str | Path]
    result: Callable[[Path], Any]
    setup: Callable[[Path], None] = lambda place: None
    begin: str = ""
    every: int = 1  # of the kills, one of so many


def killed_run(case: Killing, place: Path, changes: int | None, log: Path) -> Done:
    return run(place, *case.command, before=lambda: die_after(changes, place, log))


def kill(case: Killing, world: World, every: int, tally: Tally) -> None:
    """Kill a script before its changes of files, run it again, compare."""
    place, kept, log = (world.place / f"{case.name}-{n}" for n in ("kill", "kept", "log"))
    place.mkdir()
    command = [str(part).replace("PLACE", str(place)) for part in case.command]
    case = replace(case, command=[*command])
    every *= case.every
    case.setup(place)
    done = killed_run(case, place, None, log)
    if done.code != 0:
        tally.add(f"kill {case.name}", "no kill", "other", done.err[-300:])
        return
    wanted = case.result(place)
    lines = log.read_text().splitlines()
    begin = next((n for n, line in enumerate(lines) if case.begin and case.begin in line), 0)

    def fresh() -> None:
        shutil.rmtree(place)
        place.mkdir()
        case.setup(place)

    def again() -> None:
        shutil.rmtree(place)
        shutil.copytree(kept, place)

    points: list[tuple[Callable[[], None], int]] = []
    if begin:
        fresh()
        killed_run(case, place, begin, log)
        shutil.copytree(place, kept)
        again()
        killed_run(case, place, None, log)
        points += [(again, n) for n in range(0, len(log.read_text().splitlines()), every)]
        points += [(fresh, n) for n in range(0, begin, max(begin // 10, 1) * every)]
    else:
        points += [(fresh, n) for n in range(0, len(lines), every)]
    for start, changes in points:
        start()
        begun = killed_run(case, place, changes, log)
        if begun.code != -9:
            continue  # it was done before
        done = run(place, *case.command)
        tally.add(
            f"kill {case.name}", f"before change {changes}", *survived(case, place, done, wanted)
        )
    shutil.rmtree(place)
    shutil.rmtree(kept, ignore_errors=True)


def survived(case: Killing, place: Path, done: Done, wanted: Any) -> tuple[str, str]:
    """(kind, what was said) of the run after a kill."""
    if done.code is None:
        return "hang", done.last
    if done.traceback:
        return "traceback", done.last
    if done.code != 0:
        return "lost", f"exit {done.code}: {done.last}"
    left = [p.name for p in place.iterdir() if p.name.endswith((".partial", ".replaced"))]
    if left:
        return "other", f"left over: {left}"
    found = case.result(place)
    return ("identical", "") if found == wanted else ("lost", f"{str(found)[:100]}")


def kills(world: World, with_bundle: bool) -> Iterator[Killing]:
    out = Path("PLACE/out")
    yield Killing("prepare", world.prepare(out, Path("PLACE/cache")), prepared, every=3)
    # All stages publish with the same lines.
    for stage, every in (("domain", 1), ("instruction", 3), ("safety", 3)):
        yield Killing(stage, world.train(stage, out), trained, begin="/result", every=every)

    def older(place: Path) -> None:
        shutil.copytree(world.place / "older", place / "out")

    older_command = [*world.train("domain", world.place / "older"), "--set", "domain.max_steps=2"]
    run(world.place, *older_command)
    again = [*world.train("domain", out), "--overwrite"]
    yield Killing("domain --overwrite", again, trained, older, begin="/result")
    yield Killing("evaluate", world.evaluate(out), measured)
    if with_bundle:

        def finished(place: Path) -> None:
            """The work directory of a conversion whose steps are done: they take a minute."""
            shutil.copytree(world.place / "converted", place / ".out.task.partial")

        place = world.place / "first"
        place.mkdir()
        command = world.compress(place / "out.task")
        # Killed where publishing begins: every kill starts from there.
        at = {"at": "out.task.json", "log": world.place / "first.log"}
        Running(place, *command, before=lambda: die_after(None, place, **at)).wait(600)
        shutil.copytree(place / ".out.task.partial", world.place / "converted")
        yield Killing("compress", world.compress(Path("PLACE/out.task")), converted, finished)


# --- two runs at once, full disks, rights ---------------------------------------------------------
def pairs(world: World, tally: Tally, times: int) -> None:
    """The same command twice at once: one makes it, the other says who does, or finds it made."""
    for name, command, result in (
        ("prepare", world.prepare(Path("PLACE/out"), Path("PLACE/cache")), prepared),
        ("domain", world.train("domain", Path("PLACE/out")), trained),
        ("evaluate", world.evaluate(Path("PLACE/out")), None),
    ):
        for number in range(times):
            place = world.place / f"pair-{name}-{number}"
            place.mkdir()
            own = [str(part).replace("PLACE", str(place)) for part in command]
            both = [Running(place, *own), Running(place, *own)]
            ended = [one.wait() for one in both]
            codes = sorted(str(done.code) for done in ended)
            said = " | ".join(done.last for done in ended)
            case = f"run {number}"
            if any(done.traceback for done in ended):
                tally.add("pairs", f"{name} {case}", "traceback", said)
            elif codes not in (["0", "0"], ["0", "2"]):
                tally.add("pairs", f"{name} {case}", "wrong exit", f"{codes} {said}")
            elif codes == ["0", "2"] and "is being made by process" not in said:
                tally.add("pairs", f"{name} {case}", "other", said)
            else:
                if result:
                    result(place)
                tally.add("pairs", f"{name} {case}", "right exit")


def limits(world: World, tally: Tally) -> None:
    """Full disks, no rights: one message, exit 1, nothing under the final name; then it works."""
    commands = {
        "prepare": world.prepare(Path("PLACE/out"), Path("PLACE/cache")),
        "domain": world.train("domain", Path("PLACE/out")),
        "safety": world.train("safety", Path("PLACE/out")),
        "evaluate": world.evaluate(Path("PLACE/out")),
    }
    for name, command in commands.items():
        for size in (0, 100, 2_000, 20_000):
            place = world.place / f"limit-{name}-{size}"
            place.mkdir()
            own = [str(part).replace("PLACE", str(place)) for part in command]
            # Files of the run itself: what it says is no larger than that.
            done = run(place, *own, before=tiny_world.file_limit(size) if size else None)
            if size == 0:
                kind = "right exit" if done.code == 0 else "other"
                tally.add("limits", f"{name} without a limit", kind, done.last)
                continue
            published = (place / "out/final.json" if name == "evaluate" else place / "out").exists()
            if done.code == 0 or published:
                kind = "right exit" if done.code == 0 and published else "lost"
                tally.add("limits", f"{name}, {size} bytes", kind, done.last)
                continue
            tally.refused("limits", f"{name}, {size} bytes", done, (1,))
            done = run(place, *own)
            kind = "identical" if done.code == 0 else "lost"
            tally.add("limits", f"{name} after {size} bytes", kind, done.last)
        if os.getuid() == 0:
            place = world.place / f"rights-{name}"
            place.mkdir()
            place.chmod(0o555)
            own = [str(part).replace("PLACE", str(place)) for part in command]
            logs = world.place / f"logs-{name}"
            logs.mkdir()
            done = run(logs, *own, before=fault_inputs.nobody)
            tally.refused("limits", f"{name}, read-only", done, (1,))


def write(path: Path, tally: Tally, quick: bool, seconds: dict[str, float], place: Path) -> None:
    """The numbers of the parts that were done, `seconds` by part, as JSON."""
    report = {
        "quick": quick,
        "counts": {part: dict(found) for part, found in tally.counts.items()},
        "all": {kind: sum(found[kind] for found in tally.counts.values()) for kind in KINDS},
        "bad": [line.replace(str(place), "WORK") for line in tally.bad],
        "seconds": seconds,
    }
    text = json.dumps(report, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="every eighth kill")
    parser.add_argument("--only", choices=("kills", "inputs", "pairs", "limits"), action="append")
    parser.add_argument("--no_bundle", action="store_true", help="without compress_model.py")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there as well")
    args = parser.parse_args()
    parts = args.only or ["kills", "inputs", "pairs", "limits"]
    started = time.monotonic()
    tally, seconds = Tally(), {}
    tiny_world.import_everything()
    place = Path(tempfile.mkdtemp(prefix="liteguard_faults.", dir="/var/tmp"))
    place.chmod(0o755)
    world = World(place)
    try:
        world.make()
        work: dict[str, Callable[[], None]] = {
            "inputs": lambda: fault_inputs.all_inputs(world, tally),
            "pairs": lambda: pairs(world, tally, 1 if args.quick else 3),
            "limits": lambda: limits(world, tally),
            "kills": lambda: (
                [
                    kill(case, world, 8 if args.quick else 1, tally)
                    for case in kills(world, not args.no_bundle)
                ]
                and None
            ),
        }
        for part, do in work.items():
            if part in parts:
                begin = time.monotonic()
                print(f"{part} ...", flush=True)
                do()
                seconds[part] = round(time.monotonic() - begin, 1)
    finally:
        shutil.rmtree(place, ignore_errors=True)
        print(f"\n{tally.table()}\n\n{time.monotonic() - started:.0f} s; {len(tally.bad)} bad")
        if args.json:
            write(Path(args.json), tally, args.quick, seconds, place)
    sys.exit(bool(tally.bad))


if __name__ == "__main__":
    main()
