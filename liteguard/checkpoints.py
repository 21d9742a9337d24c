"""Stage directories: complete or not there, self-describing, in the right order.

A stage works in a hidden sibling (`.NAME.partial`). What it makes is gathered in a directory of
its own there, `stage.json` last, and that directory gets the final name in one rename: before it
nothing of the interrupted work is touched, after it the work is deleted. `stage.json` holds what
the next stage needs; nothing is guessed from names.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from liteguard import machine, records, writing
from liteguard.errors import UserError, WorkError
from liteguard.prompts import Prompt
from liteguard.records import BundleRecord, Made, StageRecord
from liteguard.writing import write_json as write_json
from liteguard.writing import write_text as write_text

RECORD = "stage.json"
INPUTS = "inputs.json"
# In a work directory: what will be published, and once that is whole, the sha256 of its record.
RESULT, PUBLISHING = "result", "publishing.json"
# What a finished output may get besides: prepare_datasets.py --report writes these.
MADE_LATER = ("report.json", "lengths.png")
# stage -> (the stage it continues, the script that makes it, its default output)
STAGES: dict[str, tuple[str | None, str, str]] = {
    "domain": (None, "train_domain.py", "domain_checkpoint"),
    "instruction": ("domain", "train_instruction.py", "instruction_checkpoint"),
    "safety": ("instruction", "train_safety.py", "final_checkpoint"),
}


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file, read in blocks; UserError for a pipe or a device, which may not end."""
    writing.require_file(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex sha256 of a JSON value with sorted keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def work_directory(output: Path) -> Path:
    """The hidden sibling in which `output` is being made.

    Raises UserError for a directory that has no name of its own, or too long a one.
    """
    if output.name in ("", ".."):
        raise UserError(f"--output {output}: name a new directory, e.g. {output / 'out'}")
    if (size := len(os.fsencode(output.name))) > writing.LONGEST_NAME:
        raise UserError(
            f"--output {output.name[:40]}...: a name of {size} bytes. Up to {writing.LONGEST_NAME} "
            "are allowed."
        )
    return output.with_name(f".{output.name}.partial")


def left_over(output: Path) -> int:
    """Bytes that an interrupted run left for the next one, or for it to replace."""
    files = work_directory(output).rglob("*")
    return sum(path.stat().st_blocks * 512 for path in files if path.is_file())


def claim(output: Path) -> None:
    """Keep other processes from making `output` until it is published or this one ends.

    Raises UserError as `check_work` does.
    """
    check_work(output)
    machine.claim(output.with_name(f".{output.name}.lock"), str(output))


def check_work(output: Path) -> None:
    """Raise UserError where something that is not ours to empty stands in the place of work.

    A link may lead anywhere; a directory may be somebody's own.
    """
    work, aside = work_directory(output), writing.moved_aside(output)
    if work.is_symlink():
        raise UserError(
            f"{work} is a symbolic link, and left as it is: remove it, or choose another --output."
        )
    if work.exists() and not work.is_dir():
        raise UserError(
            f"{work} is a file, and left as it is: remove it, or choose another --output."
        )
    known = {work: (INPUTS, PUBLISHING, RESULT), aside: (RECORD, "manifest.json")}
    for directory, names in known.items():
        # Full before it is looked into, and still so after: another process may be at work there.
        full = writing.is_full(directory)
        ours = writing.is_marked(directory) or any((directory / name).exists() for name in names)
        if full and not ours and writing.is_full(directory):
            raise UserError(
                f"{directory} was not made by LiteGuard, and what is in it would be deleted. Move "
                "it away, or choose another --output."
            )


def begin_work(work: Path, inputs: Mapping[str, Any]) -> None:
    """Make a work directory, or go on in it: known as ours from the first moment."""
    work.mkdir(parents=True, exist_ok=True)
    writing.mark(work)
    write_json(work / INPUTS, inputs)


def next_command(stage: str) -> str:
    """A command line that makes a finished `stage`."""
    parent, script, _ = STAGES[stage]
    if parent is None:
        return f"python {script} --model_type NAME, or --config FILE"
    return f"python {script} --checkpoint {STAGES[parent][2]}"


def read_stage(path: Path, expected: str | tuple[str, ...] | None = None) -> StageRecord:
    """The record of a finished stage directory, its files checked against their sha256.

    Raises UserError, with the command to run next, when the directory is missing, unfinished,
    damaged, or not one of the `expected` stages.
    """
    wanted = (expected,) if isinstance(expected, str) else expected
    advice = f"\nMake one with: {next_command(wanted[0])}" if wanted else ""
    if not path.exists():
        unfinished = work_directory(path)
        if unfinished.exists():
            raise UserError(
                f"{path} is not finished: interrupted work is in {unfinished}.\n"
                "Run the command that was making it again; it goes on from its last checkpoint."
            )
        raise UserError(f"There is no checkpoint directory {path}.{advice}")
    record_path = path / RECORD
    if not record_path.is_file():
        raise UserError(
            f"{path} has no {RECORD}, so it is not a finished LiteGuard stage (half-copied, or "
            f"made by another tool).{advice}"
        )
    record = records.read(StageRecord, record_path, advice)
    if record.adapter is None:
        raise UserError(
            f"{record_path} names no adapter_model.safetensors. Pickled weights can run code when "
            f"they are opened (adapter_model.bin), so they are not loaded.{advice}"
        )
    for name, digest in record.files.items():
        file = path / name
        if not file.is_file():
            raise UserError(f"{path} is incomplete: {name} is missing.{advice}")
        if sha256_file(file) != digest:
            raise UserError(
                f"{file} is not the file that {RECORD} describes (sha256 differs: truncated or "
                f"changed).{advice}"
            )
    _check_adapter(path, record, advice)
    if wanted and record.stage not in wanted:
        raise UserError(
            f"{path} is the result of the {record.stage!r} stage, but a "
            f"{' or '.join(map(repr, wanted))} checkpoint is needed here. The order is "
            f"domain -> instruction -> safety.{advice}"
        )
    return record


def _check_adapter(path: Path, record: StageRecord, advice: str) -> None:
    """Raise UserError where the adapter's strength is not the one that it was trained with.

    Its configuration may have been edited together with its sha256; alpha scales all that was
    learned.
    """
    file = path / "adapter_config.json"
    if not record.lora or file.name not in record.files:
        return
    found = read_dict(file)
    if found is None:
        raise UserError(f"{file} cannot be used: it is no JSON object.{advice}")
    # Records of version 0.1 do not name the scaling: it was always alpha / r.
    trained = {"use_rslora": False, **record.lora}
    stated = {"use_rslora": False, **found}
    if changes := describe_changes(trained, {key: stated.get(key) for key in trained}):
        raise UserError(
            f"{file} is not what {RECORD} says that the adapter was trained with:\n"
            + "\n".join(changes)
            + advice
        )


def read_bundle(bundle: Path) -> BundleRecord:
    """The record that compress_model.py writes beside a bundle, the bundle's sha256 checked."""
    record_path = bundle.with_name(f"{bundle.name}.json")
    if not bundle.is_file() or not record_path.is_file():
        raise UserError(
            f"{bundle} or its record {record_path.name} is missing.\n"
            f"Make both with: python compress_model.py --input final_checkpoint --output {bundle}"
        )
    record = records.read(BundleRecord, record_path)
    if sha256_file(bundle) != record.files.get(bundle.name):
        raise UserError(
            f"{bundle} is not the file that {record_path.name} describes. A bundle and its record "
            "keep the names that compress_model.py gave them."
        )
    return record


def require_same(
    path: Path, record: Made, prompt: Prompt, base: str | None = None, name: str = ""
) -> None:
    """Raise UserError unless a finished stage or bundle has this prompt and this base model.

    base: the identity of the base model called `name` (`models.base_identity`); None where it is
    not needed here.
    """
    if base is not None and _is_other_base(record.base_identity, base):
        if record.base_identity.partition("+")[0] == base.partition("+")[0]:
            raise UserError(
                f"{path} was trained on {name} with another config.json than it has now: the same "
                "weights compute something else. Put the old one back, or train again from stage 1."
            )
        raise UserError(
            f"{path} was trained on another base model ({record.base_model}, "
            f"{record.base_identity[:24]}...) than this configuration names ({name}, "
            f"{base[:24]}...). One adapter belongs to one base model."
        )
    if record.prompt != prompt:
        changes = describe_changes(record.prompt.model_dump(), prompt.model_dump())
        raise UserError(
            f"{path} was made with another prompt than this configuration has:\n"
            + "\n".join(changes)
            + "\nA model answers in the prompt it was trained with: put the old values back, or "
            "train again from stage 1."
        )


def _is_other_base(recorded: str, found: str) -> bool:
    """Whether two identities name different bases; see `models.base_identity`.

    Records of version 0.1 do not know the base's configuration, so that it is not compared.
    """
    without_configuration = "+" not in recorded
    return recorded != (found.partition("+")[0] if without_configuration else found)


def describe_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Human-readable differences between two flat mappings of inputs."""
    bases = old.get("base"), new.get("base")
    if all(isinstance(base, str) for base in bases) and not _is_other_base(*map(str, bases)):
        new = {**new, "base": bases[0]}
    return [
        f"  {key}: {old.get(key)!r} -> {new.get(key)!r}"
        for key in sorted({*old, *new})
        if old.get(key) != new.get(key)
    ]


def check_output(output: Path, inputs: Mapping[str, Any], record: str = RECORD) -> None:
    """Raise UserError unless `output` is free, or what the same command made earlier.

    Only that is ever replaced: no directory of something else, whatever the flags say.
    """
    place = next((p for p in (output, *output.parents) if p.exists() and not p.is_dir()), None)
    here = Path.cwd().resolve()
    if place:
        problem = f"{place} is a file, and a directory is needed there"
    elif output.is_symlink():
        problem = f"{output} is a symbolic link"
    elif output.exists() and writing.is_mount(output):
        problem = f"{output} is a mount point, which cannot be replaced by a finished directory"
    elif output.resolve() in (here, *here.parents):
        problem = f"{output} is the directory that you are in, or one above it"
    elif output.exists() and any(output.iterdir()) and not _is_ours(output, inputs, record):
        problem = f"{output} exists and was not written by LiteGuard, at least not by this command"
    else:
        return check_work(output)
    raise UserError(
        f"{problem}. It is left as it is, with --overwrite too: choose another --output."
    )


def _is_ours(output: Path, inputs: Mapping[str, Any], record: str) -> bool:
    """Whether a directory is a finished output of the same kind, damaged or not."""
    found = read_dict(output / record) or {}
    files, begun, stage = (found.get(name) for name in ("files", "inputs", "stage"))
    known = isinstance(files, dict) and isinstance(begun, dict) and bool(begun)
    return known and stage == inputs.get("stage", stage)


def open_work(
    output: Path,
    inputs: dict[str, Any],
    overwrite: bool = False,
    record: str = RECORD,
    resumable: bool = True,
) -> Path | None:
    """Prepare to make `output` from `inputs`; None when it is already finished from the same.

    The work directory may hold interrupted work from the same inputs, to be resumed, with
    `overwrite` as well: that replaces a finished output, and interrupted work of other inputs.
    Work that was interrupted in its last moment, when only the rename was left, is finished here.
    Raises UserError, naming what changed, when either is there without it.

    resumable: whether interrupted work is gone on from; else it is deleted.
    """
    inputs = json.loads(json.dumps(inputs, default=str))
    check_output(output, inputs, record)
    claim(output)
    writing.bring_back(output)
    work = work_directory(output)
    published = finish_publishing(work, output)
    begun = begun_from(work)
    if begun is None or not resumable or (overwrite and begun != inputs):
        # Without its inputs nobody knows what it was the work of: a kill while it was deleted.
        forget_work(work)
        begun = None
    if not (overwrite and not published) and (output / record).exists():
        if not (changes := _changes(output, inputs, record)):
            return None
        if not overwrite:
            raise UserError(
                f"{output} was made from other inputs:\n"
                + "\n".join(changes)
                + "\nChoose another --output, or pass --overwrite to replace it."
            )
    if begun is not None:
        changes = describe_changes(begun, inputs)
        if changes:
            raise UserError(
                f"Interrupted work in {work} was started from other inputs and cannot be resumed:\n"
                + "\n".join(changes)
                + "\nPut the old values back, or pass --overwrite to start again."
            )
    if overwrite:
        _keep_strangers(output, record)
    begin_work(work, inputs)
    return work


def _changes(output: Path, inputs: dict[str, Any], record: str) -> list[str]:
    """What of a finished output's inputs is not as in `inputs`; UserError where it is damaged."""
    finished = read_dict(output / record) or {}
    try:
        whole = all(sha256_file(output / n) == d for n, d in finished["files"].items())
        changes = describe_changes(finished["inputs"], inputs)
    except (ValueError, KeyError, AttributeError, OSError, UserError):
        whole, changes = False, []
    if not whole:
        raise UserError(
            f"{output} is damaged: its files are not those that {record} describes.\n"
            "Choose another --output, or pass --overwrite to make it again."
        )
    return changes


def _keep_strangers(output: Path, record: str) -> None:
    """Raise UserError where a directory that will be replaced holds somebody else's files."""
    known = {record, *(read_dict(output / record) or {}).get("files", ()), *MADE_LATER}
    found = [path for path in output.rglob("*") if not path.is_dir() or path.is_symlink()]
    others = sorted({str(path.relative_to(output)) for path in found} - known)
    if others:
        raise UserError(
            f"{output} would be replaced, and holds files that were not made by this command: "
            f"{', '.join(others[:5])}. Move them away, or choose another --output."
        )


def begun_from(work: Path) -> dict[str, Any] | None:
    """The inputs of interrupted work; None where they are not known."""
    return read_dict(work / INPUTS)


def read_dict(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def publish(
    work: Path, output: Path, record: dict[str, Any], files: list[str], name: str = RECORD
) -> None:
    """Gather `files` and the record (last) of `work` in one directory and rename that to `output`.

    `files` are names inside `work`; their sha256 goes into the record. An older `output` is
    replaced by that rename, and the rest of `work` deleted after it: killed before, the same
    command goes on from what is there; killed after, it deletes what is left
    (`finish_publishing`).
    """
    missing = [file for file in files if not (work / file).is_file()]
    if missing:
        raise WorkError(f"{work} lacks {', '.join(missing)}; nothing was published.")
    inputs = json.loads((work / INPUTS).read_text(encoding="utf-8"))
    digests = {file: sha256_file(work / file) for file in sorted(files)}
    result = work / RESULT
    writing.remove(result)
    for file in files:
        (result / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(work / file, result / file)
    write_json(result / name, {**record, "inputs": inputs, "files": digests})
    writing.flush(result)
    write_json(work / PUBLISHING, {"name": name, "sha256": sha256_file(result / name)})
    finish_publishing(work, output)
    machine.release(output.with_name(f".{output.name}.lock"))


def finish_publishing(work: Path, output: Path) -> bool:
    """Rename what `publish` has gathered in `work`, if a kill has not let it, and delete the rest.

    Returns whether `output` is what was gathered there.
    """
    decided = read_dict(work / PUBLISHING)
    if decided is None:
        return False

    def is_it(directory: Path) -> bool:
        path = directory / str(decided.get("name"))
        return path.is_file() and sha256_file(path) == decided.get("sha256")

    if not is_it(output):
        if not is_it(work / RESULT):
            return False
        writing.put(work / RESULT, output)
    drop_work(work)
    return True


def drop_work(work: Path) -> None:
    """Delete a work directory whose result is published.

    What says that it is goes last: the rest may be large, and a kill leaves some of it.
    """
    last = [work / writing.MARK, work / INPUTS, work / PUBLISHING]
    for path in [*(path for path in work.iterdir() if path not in last), *last]:
        writing.remove(path)
    work.rmdir()


def forget_work(work: Path) -> None:
    """Delete a work directory that is not gone on from; it need not be there.

    Its inputs go first: nobody resumes what a kill leaves of it.
    """
    if work.is_dir():
        writing.mark(work)
        writing.remove(work / INPUTS)
        writing.remove_marked(work)
