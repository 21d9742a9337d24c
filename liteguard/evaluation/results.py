"""Which results there will be, what each depends on, and which of them are there already."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from liteguard import checkpoints, records, registry, writing
from liteguard.config import Config
from liteguard.data import sets, shards
from liteguard.errors import UserError
from liteguard.evaluation import contamination
from liteguard.evaluation.journal import Journal
from liteguard.evaluation.refusals import JUDGE_VERSION
from liteguard.records import Made, Result
from liteguard.wheels import WHEELS

# Changes when a result of an older version lacks what this one reads.
FORMAT = 8


def targets_by_label(base: bool, finished: Mapping[str, Made]) -> dict[str, str | None]:
    """Label of a result -> what is measured; the base model has no path."""
    found: dict[str, str | None] = {"base": None} if base else {}
    for path, record in finished.items():
        label = "final" if record.stage == "safety" else record.stage
        if label in found:
            raise UserError(
                f"{found[label]} and {path} would both be written to {label}.json.\n"
                "Measure them one by one, each with its own --output; --compare takes files."
            )
        found[label] = path
    return found


def check_places(output: Path, labels: Iterable[str]) -> None:
    """Raise UserError, before the work, where a result or its journal would replace another's file.

    A link leads to one; a file that is cut or edited is known by what is left in it.
    """
    for label in labels:
        for path in (output / f"{label}.json", output / f"{label}.partial.jsonl"):
            if path.is_symlink():
                raise UserError(
                    f"{path} is a symbolic link, and left as it is: remove it, or choose another "
                    "--output."
                )
            writing.require_file(path)
            if path.is_file() and not _is_ours(path):
                raise UserError(
                    f"{path} was not written by evaluate_model.py, and would be replaced. Move it "
                    "away, or choose another --output."
                )


def _is_ours(path: Path) -> bool:
    if not path.stat().st_size:
        return True
    if path.suffix == ".jsonl":
        return Journal.is_one(path)
    found = checkpoints.read_dict(path)
    if found is not None:
        return {"answers", "inputs"} <= {*found}
    return b'"answers"' in path.read_bytes()


def benchmark_files() -> str:
    """sha256 of the files that hold the public questions."""
    wheels = {registry.BENCHMARKS[name][0] for name in registry.MULTIPLE_CHOICE}
    return ",".join(sorted(WHEELS[name].sha256 for name in wheels))


def keep_longer_runs(output: Path, label: str, inputs: dict[str, Any]) -> None:
    """A quick look must not take the place of a result, or of the answers of a run cut short."""
    file, journal = output / f"{label}.json", output / f"{label}.partial.jsonl"
    if reuse(file, inputs):
        return  # and nothing will be measured
    if file.is_file():
        found = file
    elif Journal.begun_from_others(journal, inputs):
        found = journal
    else:
        return
    raise UserError(
        f"{found} was measured with other settings, and --limit would replace it.\n"
        "Choose another --output (quick_look, say), or pass --overwrite."
    )


def evaluate_fewer(config: Config, limit: int) -> Config:
    """The configuration with `limit` rows of every set; benchmarks that are off stay off."""
    if limit < 1:
        raise UserError(f"--limit {limit}: at least 1, e.g. --limit 8 for a quick look")
    section = config.evaluate
    names = ["perplexity_rows", "question_rows", "seen_question_rows", "harmful_rows"]
    rows = dict.fromkeys([*names, "benign_rows"], limit)
    rows["knowledge_rows"] = limit if section.knowledge_rows else 0
    smaller = [
        own.model_copy(update={"rows": min(own.rows or limit, limit)}) for own in section.sets
    ]
    used = section.as_used.model_copy(update={"rows": min(section.as_used.rows, limit)})
    update = {**rows, "sets": smaller, "as_used": used}
    fewer = config.model_copy(update={"evaluate": section.model_copy(update=update)})
    changed = [*rows]
    changed += ["as_used.rows"] if used != section.as_used else []
    changed += ["sets"] if smaller != section.sets else []
    fewer._sources = config.sources | {f"evaluate.{name}": "--limit" for name in changed}
    return fewer


def reuse(file: Path, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """An earlier result for the same inputs; None where the file holds anything else.

    Raises UserError for what is no file.
    """
    writing.require_file(file)
    try:
        _, earlier = records.read_raw(Result, file)
    except UserError:
        return None
    changes = checkpoints.describe_changes(earlier["inputs"], json.loads(json.dumps(inputs)))
    return None if changes else earlier


def inputs_of(
    config: Config,
    rows: Mapping[str, list[dict[str, Any]]],
    files: Mapping[str, str],
    record: Made | None,
    base: str | None,
    trained_on: tuple[list[Path], list[str]],
) -> dict[str, Any]:
    """Everything that a result depends on; one of the same inputs is reused.

    Args:
        rows: the held-out rows by set.
        files: the prepared data's files and their sha256.
        record: of a stage or a bundle; None for the base model.
        base: identity of the base model; None where a bundle is measured, which needs none.
        trained_on: `contamination.training_data`.
    """
    directories, unchecked = trained_on
    split = f"{config.evaluate.split}.jsonl"
    return {
        "format": FORMAT,
        "judge": JUDGE_VERSION,
        "model": record.files if record else config.model.model_dump(),
        "base": base,
        "rows": {name: digest for name, digest in files.items() if name.endswith(split)},
        "trained_on": [contamination.train_files(directory) for directory in directories],
        "unchecked": unchecked,
        # The batch size may be lowered after a crash for lack of memory.
        "evaluate": config.evaluate.model_dump(exclude={"batch_size", "sets", "verdict"}),
        **({"sets": sets.fingerprint(config)} if config.evaluate.sets else {}),
        # Their rows are made while measuring, by the rules that make training rows.
        **({"set_rows": shards.ROWS_VERSION} if config.evaluate.sets else {}),
        "counts": {name: len(found) for name, found in rows.items()},
        "benchmarks": benchmark_files() if config.evaluate.knowledge_rows else None,
        "prompt": config.prompt.model_dump(),
    }
