"""What goes up: the files, a card with the evaluation's numbers, and the proof, made here first.

Records name places of this machine (where the data lay, which stage came before); what is handed
to others keeps the last part of such a path only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from liteguard import checkpoints, machine, models, records, shown
from liteguard.config import Config, of_a_record
from liteguard.errors import UserError
from liteguard.evaluation import card, comparison, report, verdict
from liteguard.export import apps
from liteguard.records import BundleRecord, Result, StageRecord

KINDS = ("bundle", "adapter", "merged")
# A path of this machine, or of the one that the stage came from.
_PATH = re.compile(r"(?:file:/|/|~/|\.{1,2}/|[A-Za-z]:\\).+", re.DOTALL)
# Keys whose values are places, also where these begin in the current directory.
_PLACES = ("path", "parent", "data_dir", "decontaminate", "config_name", "config_sources")
# What training data are called that could not be looked at (`contamination.training_data`).
_UNCHECKED = re.compile(r"(what (?:an earlier )?)?.*[/\\]", re.DOTALL)
# The folders of such a path within a sentence.
_FOLDERS = re.compile(r"(?<!\S)(?:/(?=[^\s/])|~/|\.\./|[A-Za-z]:\\).*[/\\]")
USE = {
    "bundle": "```bash\npython chat.py {name}\n```\n\nor any program with LiteRT-LM. What an app "
    "needs to know (prompt, stop tokens, lengths) is in `{deploy}`.",
    "adapter": "```python\nfrom peft import AutoModelForCausalLM\n\n"
    'model = AutoModelForCausalLM.from_pretrained("{repository}")\n```',
    "merged": "```python\nfrom transformers import AutoModelForCausalLM\n\n"
    'model = AutoModelForCausalLM.from_pretrained("{repository}")\n```',
}


@dataclass(frozen=True)
class Source:
    """A proven bundle, and what it was made from where that goes up.

    `stage` and `stage_record`: of the final checkpoint; None where the bundle itself goes up.
    """

    bundle: Path
    record: BundleRecord
    kind: card.Kind
    stage: Path | None = None
    stage_record: StageRecord | None = None

    @property
    def label(self) -> str:
        """The name of its result in the evaluation's directory."""
        return "bundle" if self.kind == "bundle" else "final"


def proven(bundle: Path, kind: card.Kind) -> Source:
    """The bundle and the stage behind it. Raises UserError unless the proof passed on these files.

    The bundle's sha256 is checked against its record, the adapter's against what the bundle was
    made from.
    """
    record = checkpoints.read_bundle(bundle)
    again = f"Make the bundle again with its proof: python compress_model.py --output {bundle} ..."
    if not record.verify:
        raise UserError(f"{bundle} has no proof (--verify none), so it is not published.\n{again}")
    if failed := record.verify.failed:
        raise UserError(f"{bundle} did not pass its proof: {', '.join(failed)}.\n{again}")
    if not record.verify.steps:
        raise UserError(f"the proof of {bundle} has no steps: its record is damaged.\n{again}")
    if kind == "bundle":
        return Source(bundle, record, kind)
    stage = Path(record.parent or "")
    stage_record = checkpoints.read_stage(stage, "safety")
    if stage_record.adapter != record.parent_adapter_sha256:
        raise UserError(
            f"{stage} is not what {bundle} was made from (its adapter's sha256 differs), so the "
            f"bundle's proof says nothing of it.\n{again}"
        )
    return Source(bundle, record, kind, stage, stage_record)


def measured(source: Source, evaluation: Path) -> dict[str, Any]:
    """What the card shows (`report.report_facts`): the base's result and that of these files.

    Raises UserError where exactly these were not measured.
    """
    flag = (
        f"--bundle {source.bundle}" if source.kind == "bundle" else f"--checkpoint {source.stage}"
    )
    command = f"Measure with: python evaluate_model.py --base {flag} --output {evaluation}"
    file = evaluation / f"{source.label}.json"
    if not file.is_file():
        raise UserError(f"there is no result {file}, and a card needs numbers.\n{command}")
    result = records.read(Result, file, f"\n{command}")
    made = source.record if source.stage_record is None else source.stage_record
    if (result.inputs.model_extra or {}).get("model") != made.files:
        raise UserError(f"{file} is of other files than those that would go up.\n{command}")
    names = [name for name in ("base", source.label) if (evaluation / f"{name}.json").is_file()]
    results = comparison.read_results(names, evaluation)
    said = verdict.verdict(results, verdict.limits_of(results, []))
    shorter: dict[str, str] = {}
    for each in results.values():
        leaks = each["contamination"]
        briefly = {text: _UNCHECKED.sub(r"\1", text, count=1) for text in leaks["unchecked"]}
        leaks["unchecked"] = [*briefly.values()]
        shorter |= briefly
        # A row may be of somebody's own set.
        leaks["examples"] = [[name, "(not shown)"] for name, _ in leaks["examples"]]

    def told(text: str) -> str:
        for long, short in shorter.items():
            text = text.replace(long, short)
        return _FOLDERS.sub("", text)

    said = replace(said, reasons=[replace(own, text=told(own.text)) for own in said.reasons])
    return report.report_facts(results, said)


def readme(source: Source, facts: dict[str, Any], repository: str) -> str:
    """The card: metadata, how to open it, numbers, and the steps of the proof."""
    facts = {**facts, "base_licence": facts["base_licence"] or source.record.base_licence or ""}
    names = {"name": source.bundle.name, "deploy": f"{source.bundle.stem}.deploy.json"}
    lines = [
        card.front_matter(facts, source.kind, repository.split("/")[-1]),
        report.render("model_card_template.md", facts),
        f"## How to use\n\n{USE[source.kind].format(repository=repository, **names)}\n",
        "## Proof\n",
        f"The bundle `{shown.markdown(source.bundle.name)}` was opened, questioned and compared "
        "with the merged model on held-out rows before it got its name:\n",
        "| step | measured | allowed |\n|---|---|---|",
    ]
    for step in source.record.verify.steps if source.record.verify else ():
        cells = (step.step, str(step.measured), str(step.tolerance))
        lines.append(f"| {' | '.join(map(shown.markdown, cells))} |")
    return "\n".join(lines) + "\n"


def without_places(value: Any, place: bool = False) -> Any:
    """A record's value with the last part of every path in place of the path.

    place: the value is a path or has some, also where it does not look like one.
    """
    if isinstance(value, Mapping):
        # A prompt is never a path, whatever it begins with.
        return {
            k: v if k == "prompt" else without_places(v, place or k in _PLACES)
            for k, v in value.items()
        }
    if isinstance(value, list):
        return [without_places(inside, place) for inside in value]
    if isinstance(value, str) and (place or _PATH.fullmatch(value)):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value


def _for_others(record: BundleRecord | StageRecord) -> dict[str, Any]:
    """A record as it is handed out: read as before, without places of this machine and rows.

    The rows that a bundle was proven on may be the user's own, and are in its record to look at.
    """
    kept = record.to_dict() if isinstance(record, BundleRecord) else record.model_dump()
    for measured in (kept.get("verify") or {}).values():
        if isinstance(measured, dict):
            measured.pop("answers", None)
    kept["config"] = of_a_record(kept["config"])[0]
    return without_places(kept)


def collect(
    source: Source,
    config: Config,
    card_text: str,
    work: Path,
    merge: bool = True,
    repository: str = "",
) -> dict[str, Path]:
    """Name in the repository -> file; what has to be made is made in `work`.

    repository: where they go, for AI Edge Gallery to fetch a bundle from.
    merge: whether to make the merged model, where that goes up; its files are missing without.
    """
    files = {"README.md": work / "README.md"}
    checkpoints.write_text(files["README.md"], card_text)
    if source.kind == "bundle":
        for path in (source.bundle, source.bundle.with_name(f"{source.bundle.stem}.deploy.json")):
            files[path.name] = path
        name = f"{source.bundle.name}.json"
        files[name] = work / name
        checkpoints.write_json(files[name], _for_others(source.record))
        listed = f"{source.bundle.stem}.gallery.json"
        files[listed] = work / listed
        entry = apps.gallery(source.record, source.bundle.name, repository)
        checkpoints.write_json(files[listed], entry)
        return files
    files["proof.json"] = work / "proof.json"
    proof = _for_others(source.record)
    checkpoints.write_json(files["proof.json"], {k: proof[k] for k in ("verify", "files")})
    if source.stage is None or source.stage_record is None:
        raise ValueError("a stage is needed")
    if source.kind == "adapter":
        return files | _adapter(source.stage, source.stage_record, work)
    if merge:
        files |= _merged(source, config, work / "merged")
    return files


def _adapter(stage: Path, record: StageRecord, work: Path) -> dict[str, Path]:
    """A stage's files; PEFT's configuration names the base on the hub instead of a folder here."""
    files = {name: stage / name for name in record.files}
    settings = json.loads((stage / "adapter_config.json").read_text(encoding="utf-8"))
    base = card.hub_name(record.base_model) or record.base_model
    settings |= {"base_model_name_or_path": base, "revision": record.base_revision}
    files["adapter_config.json"] = work / "adapter_config.json"
    checkpoints.write_json(files["adapter_config.json"], without_places(settings))
    kept = _for_others(record)
    kept["files"]["adapter_config.json"] = checkpoints.sha256_file(files["adapter_config.json"])
    files[checkpoints.RECORD] = work / checkpoints.RECORD
    checkpoints.write_json(files[checkpoints.RECORD], kept)
    return files


def _merged(source: Source, config: Config, output: Path) -> dict[str, Path]:
    """The merged model, made again as for the bundle. Raises UserError on another base model."""
    from liteguard.export import merge

    stage, record = source.stage, source.stage_record
    if stage is None or record is None:
        raise ValueError("a stage is needed")
    base, revision, architecture = models.model_config(config)
    identity = models.base_identity(base, revision)
    checkpoints.require_same(stage, record, config.prompt, identity, config.model.name)
    machine.check_disk(output.parent, 2.2 * models.count_parameters(architecture) / 1e9)
    trusted = config.model.trust_remote_code
    parts = (base, stage, output, config.prompt, revision, trusted)
    machine.in_child("merge", merge.merge_adapter, *parts)
    return {path.name: path for path in sorted(output.iterdir()) if path.is_file()}
