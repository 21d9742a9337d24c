"""Where bundles, their records and unfinished work are: complete or not at all, never mixed up."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from liteguard import checkpoints
from liteguard.errors import UserError


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
        record_path = output.with_name(f"{output.name}.json")
        try:
            record = json.loads(record_path.read_text(encoding="utf-8"))
            whole = checkpoints.sha256_file(output) == record["files"][output.name]
        except (OSError, ValueError, KeyError):
            whole = False
        if not whole:
            raise UserError(
                f"{output} exists, but is not a bundle that {record_path.name} describes. Choose "
                "another --output, or pass --overwrite to replace what is there."
            )
        changes = checkpoints.describe_changes(record["inputs"], json.loads(json.dumps(inputs)))
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
    work = checkpoints.work_directory(output)
    made_of = {k: v for k, v in inputs.items() if not k.startswith("compress.verify.")}
    inputs = json.loads(json.dumps(made_of))
    if checkpoints.begun_from(work) != inputs:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        checkpoints.write_json(work / checkpoints.INPUTS, inputs)
    return work


def publish(
    work: Path, bundles: list[Path], record: dict[str, Any], deployment: dict[str, Any]
) -> None:
    """Give records, then bundles, their final names, and drop the intermediate files.

    Old bundles go first: a new record never stands beside an old bundle.
    """
    for output in bundles:
        output.unlink(missing_ok=True)
        checkpoints.write_json(output.with_name(f"{output.name}.json"), record)
    checkpoints.write_json(bundles[0].with_name(f"{bundles[0].stem}.deploy.json"), deployment)
    for output in bundles:
        os.replace(work / output.name, output)
    shutil.rmtree(work)
