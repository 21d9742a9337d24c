"""Where bundles, their records and unfinished work are: complete or not at all, never mixed up."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from liteguard import checkpoints, machine, shown, writing
from liteguard.errors import UserError, WorkError
from liteguard.export.verify import TooCoarse
from liteguard.machine import peak_rss_gb
from liteguard.progress import ticking
from liteguard.records import BundleRecord

SUFFIXES = (".task", ".litertlm")


def containers(output: Path, only: str | None = None) -> list[Path]:
    """The bundles to make: what `output` names, then the other container, or the one of `only`.

    Args:
        output: the file of `--output`.
        only: "task" or "litertlm"; None for both.

    Raises UserError for another ending, and where `only` contradicts it.
    """
    if output.suffix not in SUFFIXES:
        raise UserError(f"--output {output}: the bundle's name must end in .task or .litertlm")
    if only and output.suffix != f".{only}":
        raise UserError(f"--output {output} and --only {only} contradict each other")
    other = output.with_suffix(SUFFIXES[1 - SUFFIXES.index(output.suffix)])
    return [output] if only else [output, other]


def beside(bundles: list[Path]) -> list[Path]:
    """The records of `bundles`, then what an app, and AI Edge Gallery, need to know of them."""
    records = [path.with_name(f"{path.name}.json") for path in bundles]
    stem = bundles[0].stem
    told = [bundles[0].with_name(f"{stem}.{which}.json") for which in ("deploy", "gallery")]
    return [*records, *told]


def check(bundles: list[Path]) -> None:
    """Raise UserError, before the work, for what a finished bundle cannot or must not replace."""
    _check_work(bundles[0])
    records = beside(bundles)
    for path in (*bundles, *records):
        plain = path.is_file() and not path.is_symlink() and not writing.is_mount(path)
        if (path.exists() or path.is_symlink()) and not plain:
            raise UserError(
                f"{path} is a link, a directory, a device or a mount point: a file cannot take its "
                "place. Choose another --output."
            )
    for path in (*records, *bundles):
        if path.exists() and not (_is_ours(path) if path in records else _is_described(path)):
            raise UserError(
                f"{path} was not written by LiteGuard, or was changed since, and would be "
                "replaced. Move it away, or choose another --output."
            )


def _is_ours(path: Path) -> bool:
    keys = {"models"} if path.name.endswith(".gallery.json") else {"files", "bundles"}
    return bool(keys & {*(checkpoints.read_dict(path) or {})})


def _is_described(bundle: Path) -> bool:
    """Whether the record beside a bundle names its sha256, or a publishing that a kill cut does."""
    record = checkpoints.read_dict(bundle.with_name(f"{bundle.name}.json")) or {}
    cut = [checkpoints.read_dict(work / checkpoints.PUBLISHING) for work in _works(bundle)]
    digest = checkpoints.sha256_file(bundle)
    named = (record.get("files"), *cut)
    return any(isinstance(files, dict) and files.get(bundle.name) == digest for files in named)


def _works(output: Path) -> list[Path]:
    """Where the containers of `output`'s name are made: in either order, by two commands."""
    return [checkpoints.work_directory(output.with_suffix(suffix)) for suffix in SUFFIXES]


def _check_work(output: Path) -> None:
    for path in {output, *(output.with_suffix(suffix) for suffix in SUFFIXES)}:
        checkpoints.check_work(path)


def claim(output: Path) -> None:
    """Hold the name of `output` without its ending: all containers write the same records."""
    _check_work(output)
    machine.claim(output.with_name(f".{output.stem}.bundle.lock"), str(output))


def reuse(bundles: list[Path], inputs: dict[str, Any]) -> bool:
    """Whether `bundles` are complete bundles made from `inputs`; other inputs are an error."""
    if not any(path.exists() for path in bundles):
        return False
    for output in bundles:
        if not output.exists():
            made = next(path for path in bundles if path.exists())
            raise UserError(
                f"{made} was made without {output.name}. Pass --only {made.suffix[1:]} to keep it "
                "so, choose another --output for both, or pass --overwrite to convert again."
            )
        try:
            record = checkpoints.read_bundle(output)
        except UserError as error:
            raise UserError(
                f"{output} exists, but is not a bundle that {output.name}.json describes: {error}\n"
                "Choose another --output, or pass --overwrite to replace what is there."
            ) from None
        changes = checkpoints.describe_changes(record.inputs, json.loads(json.dumps(inputs)))
        if changes:
            raise UserError(
                f"{output} was made from other inputs:\n"
                + "\n".join(changes)
                + "\nChoose another --output, or pass --overwrite to replace it."
            )
    return True


def start_work(output: Path, inputs: dict[str, Any], overwrite: bool = False) -> Path:
    """The work directory; what an interrupted run left there is kept if its inputs were these.

    Other tolerances of the proof change no file, so they do not count. `overwrite`: recipes that
    did not pass are tried again.
    """
    claim(output)
    work = checkpoints.work_directory(output)
    made_of = {k: v for k, v in inputs.items() if not k.startswith("compress.verify.")}
    inputs = json.loads(json.dumps(made_of))
    if checkpoints.begun_from(work) != inputs:
        checkpoints.forget_work(work)
        checkpoints.begin_work(work, inputs)
    if overwrite:
        Steps(work).forget("failed_*")
    return work


# Seconds, and seconds per billion parameters, on two cores (benchmarks/full_size_report.json).
SECONDS = {
    "merge": (5.0, 22.0),
    "smooth": (6.0, 30.0),  # the second one from its operations: not measured at Phi's size
    "export": (60.0, 60.0),
    "quantize": (5.0, 16.0),
    "bundle": (1.0, 5.0),
}


class Steps:
    """The steps of a conversion in its work directory, timed; those that are kept are done once."""

    def __init__(self, work: Path, parameters: int = 0) -> None:
        self.work, self.billions = work, parameters / 1e9
        self.timings: dict[str, float] = {}  # seconds
        self.peaks: dict[str, float] = {}  # GB of 10^9 bytes, of this process until then

    def run(self, name: str, function: Callable[..., Any], *positional: Any, **named: Any) -> Any:
        """Do a step and print its time, and every 15 seconds that it is still at work."""
        print(f"{name} ...")
        begin = time.time()
        # What calibrates and proves counts its own layers, answers and texts.
        known = SECONDS.get(name.split("_")[0])
        expected = known and known[0] + known[1] * self.billions
        with ticking(name, expected) if known else contextlib.nullcontext():
            result = function(*positional, **named)
        self.timings[name] = round(time.time() - begin, 1)
        self.peaks[name] = peak_rss_gb()
        print(f"  {name}: {shown.duration(self.timings[name])}")
        return result

    def keep(self, name: str, function: Callable[..., Any], *positional: Any, **named: Any) -> Any:
        """`run` a step whose result depends on the work's inputs only; a rerun reads it instead."""
        if (result := self.kept(name)) is not None:
            return result
        result = self.run(name, function, *positional, **named)
        checkpoints.write_json(self.work / f"{name}.json", result)
        return result

    def keep_with_rows(
        self, name: str, follows: Sequence[str], function: Callable[..., Any], *positional: Any
    ) -> Any:
        """`keep` a step that reads training rows, whose facts say how many `rows` it found.

        One that found none, because they are gone or changed, is not kept: the next run may find
        some, and takes what `follows` (names, or patterns of them) again, which was made without.
        """
        if (result := self.kept(name)) is not None:
            return result
        for later in follows:
            self.forget(later)
        result = self.run(name, function, *positional)
        if result["rows"]:
            checkpoints.write_json(self.work / f"{name}.json", result)
        return result

    def kept(self, name: str) -> dict[str, Any] | None:
        """What an earlier run kept of a step."""
        return checkpoints.read_dict(self.work / f"{name}.json")

    def forget(self, name: str) -> None:
        """Let this run take a step again, or all whose names are of a pattern."""
        for path in self.work.glob(f"{name}.json"):
            writing.remove(path)

    def first_that_passes(
        self,
        attempt: Callable[[str], dict[str, Any]],
        recipes: Sequence[str],
        settings: dict[str, Any],
    ) -> dict[str, Any]:
        """The facts of the first recipe that passes its proof, with `tries`: what came before it.

        A try that failed under the same `settings` of the proof, its rows among them, is not
        repeated by a rerun.

        Raises:
            WorkError: none passed, or one failed for another reason than its rounding.
        """
        tries: list[dict[str, str]] = []
        for recipe in recipes:
            failed = self.kept(f"failed_{recipe}") or {}
            if failed.get("settings") != json.loads(json.dumps(settings)):
                try:
                    return {**attempt(recipe), "tries": tries}
                except TooCoarse as error:
                    failed = {"settings": settings, "recipe": recipe, "error": str(error)}
                    checkpoints.write_json(self.work / f"failed_{recipe}.json", failed)
            tries.append({"recipe": recipe, "error": failed["error"]})
            (self.work / f"{recipe}.tflite").unlink(missing_ok=True)
            (self.work / f"quantize_{recipe}.json").unlink(missing_ok=True)
            if recipe != recipes[-1]:
                following = recipes[recipes.index(recipe) + 1]
                print(
                    f"{recipe} did not pass: {failed['error'].splitlines()[0]}\nnext: {following}"
                )
        raise WorkError("\n".join(f"{entry['recipe']}: {entry['error']}" for entry in tries))


def publish(work: Path, bundles: list[Path], record: BundleRecord, *told: dict[str, Any]) -> None:
    """Give bundles and their records their final names, and drop the intermediate files.

    They are several files, so that no single rename does it. What decides is one: once the list of
    them is in the work directory, the next run goes on giving names (`finish_publishing`); until
    then nothing outside of it was touched. In between a bundle may stand beside another's record,
    which `checkpoints.read_bundle` refuses.

    `told`: what apps are told, in the order of `beside`.
    """
    records = beside(bundles)
    contents = [record.to_dict()] * len(bundles) + [*told]
    for path, content in zip(records, contents, strict=True):
        writing.write_json(work / path.name, content)
    for path in bundles:
        writing.flush(work / path.name)
    files = [path.name for path in (*bundles, *records)]
    decided = {name: checkpoints.sha256_file(work / name) for name in files}
    writing.write_json(work / checkpoints.PUBLISHING, decided)
    finish_publishing(bundles[0], {})


def finish_publishing(output: Path, inputs: dict[str, Any]) -> bool:
    """Give the files of a work directory their final names, if a kill has not let `publish`.

    Returns whether there were any, and they were made from `inputs`.
    """
    claim(output)
    if not any([_give_names(work) for work in _works(output)]):
        return False
    made = checkpoints.read_dict(output.with_name(f"{output.name}.json")) or {}
    return made.get("inputs") == json.loads(json.dumps(inputs))


def _give_names(work: Path) -> bool:
    """Whether a work directory has decided what to publish; that is done then."""
    decided = checkpoints.read_dict(work / checkpoints.PUBLISHING)
    if decided is None:
        if checkpoints.begun_from(work) is None:
            checkpoints.forget_work(work)  # a kill has left some of it
        return False
    # Names of this directory only; whoever can write here needs no such list.
    for name in map(str, decided):
        if (source := work / Path(name).name).is_file():
            writing.put(source, work.with_name(source.name))
    checkpoints.drop_work(work)
    return True
