"""Where bundles, their records and unfinished work are: complete or not at all, never mixed up."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from liteguard import checkpoints
from liteguard.errors import UserError, WorkError
from liteguard.export.verify import TooCoarse
from liteguard.machine import peak_rss_gb
from liteguard.records import BundleRecord


def reuse(bundles: list[Path], inputs: dict[str, Any]) -> bool:
    """Whether `bundles` are complete bundles made from `inputs`; other inputs are an error."""
    if not any(path.exists() for path in bundles):
        return False
    for output in bundles:
        if not output.exists():
            made = next(path for path in bundles if path.exists())
            raise UserError(
                f"{made} was made without {output.name}. Choose another --output for both, or pass "
                "--overwrite to convert again."
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


def start_work(output: Path, inputs: dict[str, Any]) -> Path:
    """The work directory; what an interrupted run left there is kept if its inputs were these.

    Other tolerances of the proof change no file, so they do not count.
    """
    checkpoints.claim(output)
    work = checkpoints.work_directory(output)
    made_of = {k: v for k, v in inputs.items() if not k.startswith("compress.verify.")}
    inputs = json.loads(json.dumps(made_of))
    if checkpoints.begun_from(work) != inputs:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        checkpoints.write_json(work / checkpoints.INPUTS, inputs)
    return work


def left_over(output: Path) -> int:
    """Bytes that an interrupted run left for the next one, or for it to replace."""
    files = checkpoints.work_directory(output).rglob("*")
    return sum(path.stat().st_blocks * 512 for path in files if path.is_file())


class Steps:
    """The steps of a conversion in its work directory, timed; those that are kept are done once."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.timings: dict[str, float] = {}  # seconds
        self.peaks: dict[str, float] = {}  # GB of 10^9 bytes, of this process until then

    def run(self, name: str, function: Callable[..., Any], *positional: Any, **named: Any) -> Any:
        """Do a step and print its time."""
        print(f"{name} ...")
        begin = time.time()
        result = function(*positional, **named)
        self.timings[name] = round(time.time() - begin, 1)
        self.peaks[name] = peak_rss_gb()
        print(f"  {name}: {self.timings[name]:.0f} s")
        return result

    def keep(self, name: str, function: Callable[..., Any], *positional: Any, **named: Any) -> Any:
        """`run` a step whose result depends on the work's inputs only; a rerun reads it instead."""
        kept = self.work / f"{name}.json"
        with contextlib.suppress(OSError, ValueError, RecursionError):
            result = json.loads(kept.read_text(encoding="utf-8"))
            if isinstance(result, dict):
                return result
        result = self.run(name, function, *positional, **named)
        checkpoints.write_json(kept, result)
        return result

    def first_that_passes(
        self,
        attempt: Callable[[str], dict[str, Any]],
        recipes: Sequence[str],
        settings: dict[str, Any],
    ) -> dict[str, Any]:
        """The facts of the first recipe that passes its proof, with `tries`: what came before it.

        A try that failed under the same `settings` of the proof is not repeated by a rerun.

        Raises:
            WorkError: none passed, or one failed for another reason than its rounding.
        """
        tries: list[dict[str, str]] = []
        for recipe in recipes:
            known = self.work / f"failed_{recipe}.json"
            failed: dict[str, Any] = {}
            with contextlib.suppress(OSError, ValueError, RecursionError):
                failed = {**json.loads(known.read_text(encoding="utf-8"))}
            if failed.get("settings") != json.loads(json.dumps(settings)):
                try:
                    return {**attempt(recipe), "tries": tries}
                except TooCoarse as error:
                    failed = {"settings": settings, "recipe": recipe, "error": str(error)}
                    checkpoints.write_json(known, failed)
            tries.append({"recipe": recipe, "error": failed["error"]})
            (self.work / f"{recipe}.tflite").unlink(missing_ok=True)
            (self.work / f"quantize_{recipe}.json").unlink(missing_ok=True)
            if recipe != recipes[-1]:
                following = recipes[recipes.index(recipe) + 1]
                print(
                    f"{recipe} did not pass: {failed['error'].splitlines()[0]}\nnext: {following}"
                )
        raise WorkError("\n".join(f"{entry['recipe']}: {entry['error']}" for entry in tries))


def publish(
    work: Path, bundles: list[Path], record: BundleRecord, deployment: dict[str, Any]
) -> None:
    """Give records, then bundles, their final names, and drop the intermediate files.

    Old bundles go first: a new record never stands beside an old bundle.
    """
    for output in bundles:
        output.unlink(missing_ok=True)
        checkpoints.write_json(output.with_name(f"{output.name}.json"), record.to_dict())
    checkpoints.write_json(bundles[0].with_name(f"{bundles[0].stem}.deploy.json"), deployment)
    for output in bundles:
        os.replace(work / output.name, output)
    shutil.rmtree(work)
