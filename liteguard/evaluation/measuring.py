"""What one call of evaluate_model.py measures: planned, looked at before the work, then run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liteguard import checkpoints, machine, models
from liteguard.config import Config
from liteguard.data import preparation
from liteguard.errors import UserError
from liteguard.evaluation import (
    answerers,
    contamination,
    held_out,
    llm_judge,
    results,
    rubrics,
    run,
)
from liteguard.records import BundleRecord, Made
from liteguard.rows import Row, read_manifest
from liteguard.runtime import container


def read_targets(stages: Sequence[str], bundle: str | None, base: bool) -> dict[str, Made]:
    """Path -> record of what is measured beside the base model, the bundle last.

    Raises UserError where there is nothing to measure, or a record cannot be used.
    """
    records: dict[str, Made] = {path: checkpoints.read_stage(Path(path)) for path in stages}
    if bundle:
        records[bundle] = checkpoints.read_bundle(Path(bundle))
    if not records and not base:
        raise UserError("Say what to measure: --checkpoint DIR ..., --bundle FILE, or --base.")
    return records


@dataclass(frozen=True)
class Measuring:
    """Models, held-out rows, and what each result depends on."""

    config: Config
    records: Mapping[str, Made]
    targets: Mapping[str, str | None]  # label of a result -> path; None of the base model
    rows: dict[str, list[Row]]  # of each set
    inputs: Mapping[str, dict[str, Any]]  # of each label: `results.inputs_of`
    # Of each label: the data it was trained on, and those that are not there to be looked at.
    trained_on: Mapping[str, tuple[list[Path], list[str]]]
    data_dir: Path
    output: Path
    architecture: Any  # the base's transformers config; None where only a bundle is measured

    @classmethod
    def plan(
        cls,
        config: Config,
        records: Mapping[str, Made],
        targets: Mapping[str, str | None],
        *,
        data_dir: Path,
        output: Path,
        everything: bool,
        flags: list[str],
    ) -> Measuring:
        """Read the rows that everything will be measured on, and say how many there are.

        Args:
            targets: `results.targets_by_label` of the records.
            data_dir: prepared data.
            output: the directory of the results.
            everything: every held-out row, instead of as many as `evaluate` says.
            flags: of the configuration, for commands in messages.

        Raises UserError for other models, prompts or data than those of the records.
        """
        config = models.with_base_prompt(config)
        if config.evaluate.llm_judge:
            llm_judge.Judge(config.evaluate.llm_judge)  # is its key there?
        rubrics.require_judge(config)
        base = architecture = None
        if not all(isinstance(records.get(t or ""), BundleRecord) for t in targets.values()):
            directory, commit, architecture = models.model_config(config)
            base = models.base_identity(directory, commit)
        for path, record in records.items():
            checkpoints.require_same(Path(path), record, config.prompt, base, config.model.name)
        preparation.follow_earlier_run(data_dir)  # the commits of hub sets that were kept apart
        files = read_manifest(data_dir, flags)["files"]
        rows = held_out.held_out(config, data_dir, everything=everything)
        counts = ", ".join(
            f"{len(found):,} {name.replace('_', ' ')}" for name, found in rows.items() if found
        )
        print(f"{config.evaluate.split} rows: {counts}")
        if note := held_out.language_note(config, rows):
            print(note)
        inputs, trained_on = {}, {}
        for label, target in targets.items():
            of = records[target] if target else None
            trained_on[label] = contamination.training_data(data_dir, of)
            own_base = None if isinstance(of, BundleRecord) else base
            inputs[label] = results.inputs_of(config, rows, files, of, own_base, trained_on[label])
        return cls(
            config, records, targets, rows, inputs, trained_on, data_dir, output, architecture
        )

    def _file(self, label: str) -> Path:
        return self.output / f"{label}.json"

    def is_finished(self) -> bool:
        """Whether every result is there and up to date."""
        return all(results.reuse(self._file(n), self.inputs[n]) for n in self.targets)

    def keep_longer_runs(self) -> None:
        """Raise UserError where a quick look would replace a longer measurement."""
        for label in self.targets:
            results.keep_longer_runs(self.output, label, self.inputs[label])

    def require_resources(self) -> None:
        """Say what the work needs; raises UserError where this machine, or a judge, lacks it."""
        config, longest = self.config, 0
        bundle, record = next(
            ((Path(p), r) for p, r in self.records.items() if isinstance(r, BundleRecord)),
            (None, None),
        )
        if self.architecture is not None:
            own = models.load_base_tokenizer(config)
            longest = run.longest_row(config, self.rows, lambda t: len(models.encode(own, t)))
        needed, pages = answerers.expected_memory(config, self.architecture, bundle, longest)
        print(
            f"expected peak memory: {(needed + pages) / 1e9:.1f} GB at most; {needed / 1e9:.1f} GB "
            "must be free"
        )
        less = "; a smaller evaluate.batch_size needs less for a checkpoint."
        machine.require_memory(needed, "evaluating", less)
        if self.architecture is not None:
            answerers.require_gpu_memory(self.architecture, longest)
        if bundle is not None and record is not None:
            container.require_disk(bundle, record.quantize.get("recipe", ""))
        if config.evaluate.llm_judge:
            llm_judge.Judge(config.evaluate.llm_judge).check()

    def run(self, overwrite: bool) -> dict[str, dict[str, Any]]:
        """Label -> result of each model; those that are up to date are reused."""
        self.output.mkdir(parents=True, exist_ok=True)
        found: dict[str, dict[str, Any]] = {}
        leaks: dict[tuple[Path, ...], dict[str, Any]] = {}
        for label, target in self.targets.items():
            inputs, file = self.inputs[label], self._file(label)
            if not overwrite and (earlier := results.reuse(file, inputs)):
                run.drop_journal(self.output, label, inputs)
                print(f"{label}: {file} is up to date: reused")
                found[label] = earlier
                continue
            print(f"{label}: measuring {target or self.config.model.name}")
            journal = run.journal_of(self.output, label, inputs)
            path = Path(target) if target else None
            numbers = run.measure(self.config, path, self.rows, journal)
            directories, unchecked = self.trained_on[label]
            if (key := tuple(directories)) not in leaks:
                everything = held_out.held_out(self.config, self.data_dir, everything=True)
                leaks[key] = contamination.contamination(everything, self.rows, directories)
            found[label] = {
                **numbers,
                "contamination": {**leaks[key], "unchecked": unchecked},
                "model": {
                    "name": self.config.model.name,
                    "path": target,
                    "data_dir": str(self.data_dir),
                },
                "limits": self.config.evaluate.verdict.model_dump(),
                "inputs": inputs,
            }
            checkpoints.write_json(file, found[label])
            journal.remove()
        return found
