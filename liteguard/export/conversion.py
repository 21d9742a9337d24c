"""The steps from a final checkpoint to proven bundles, each done once in the work directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liteguard import checkpoints, machine, writing
from liteguard.config import Config
from liteguard.export import (
    bundle,
    calibration,
    merge,
    silence,
    smoothing,
    tflite,
    tokenizer,
    verify,
)
from liteguard.export.measured import Samples
from liteguard.export.outputs import Steps


@dataclass
class Conversion:
    """What is converted, and where to.

    Args:
        config: its `compress` section says how.
        checkpoint: the directory of the final stage.
        base: directory of the base model.
        revision: its hub commit, or None.
        parameters: how many the model has.
        bundles: the files to make, `.task` or `.litertlm`; the first is proven whole.
        samples: rows for the proof; None for no proof.
        work: the work directory.
    """

    config: Config
    checkpoint: Path
    base: str
    revision: str | None
    parameters: int
    converter: str
    recipes: list[str]  # to be tried, in this order
    bundles: list[Path]
    samples: Samples | None
    work: Path

    def __post_init__(self) -> None:
        self.steps = Steps(self.work, self.parameters)
        self.merged = self.work / "merged"
        self.sentencepiece = self.work / "tokenizer.model"
        self.exact = self.work / "float.tflite"

    def run(self) -> dict[str, Any]:
        """All steps; returns the facts of each for the bundle's record."""
        section = self.config.compress
        facts = self.steps.keep("merge", self._merge)
        if smoothing.wanted(self.config, self.recipes):
            facts["smooth"] = self._smooth()
        # Kept apart by its name: a rerun may ask for other containers.
        kind = "sentencepiece" if self._has_task else "original"
        facts["tokenizer"] = self.steps.keep(f"tokenizer_{kind}", self._tokenizer)
        self.replaced = facts["tokenizer"]["replaced"]
        # Tokens that a .task cannot show as text must never be written by it; a .litertlm shows
        # all.
        report = tokenizer.TokenizerReport(**facts["tokenizer"])
        self.silenced = silence.Silence.of(report, self.merged)
        if self._has_task:
            facts["silence"] = self.steps.keep("silence", self.silenced.check, self.merged)
            if said := silence.warning(facts["silence"]):
                print(f"  {said}")
        facts["export"] = self.steps.keep(
            "export",
            tflite.export,
            self.merged,
            self.exact,
            prefill_lengths=section.ladder,
            kv_cache_length=section.kv_cache_length,
            converter=self.converter,
            python=section.python,
        )
        for recipe in self.recipes:
            step = f"calibrate_{recipe}"
            folder = calibration.folder(self.work, recipe, self.config)
            if folder and self.steps.kept(step) is None:
                self.steps.forget(f"failed_{recipe}")  # with other weights than there will be
        return facts | self.steps.first_that_passes(self._attempt, self.recipes, self.proof)

    @property
    def proof(self) -> dict[str, Any]:
        """What a proof's outcome hangs on beside the bundle: tolerances and the rows compared."""
        rows = self.samples and checkpoints.sha256_json(self.samples.to_dict())
        return {**self.config.compress.verify.model_dump(), "samples": rows}

    def _merge(self) -> dict[str, Any]:
        writing.remove(self.merged)
        prompt, trusted = self.config.prompt, self.config.model.trust_remote_code
        parts = self.base, self.checkpoint, self.merged, prompt, self.revision, trusted
        return {"merge": machine.in_child("merge", merge.merge_adapter, *parts)}

    def _smooth(self) -> dict[str, Any]:
        """Move outliers of activations; what follows reads the smoothed model where there is one.

        It is a folder of its own, so that a killed run never smooths twice. The other one goes
        once this step is kept: nothing reads it any more.
        """
        smoothed = self.work / "smoothed"
        given = self.config, self.checkpoint, self.merged, smoothed
        made_of_it = ["export", "calibrate_*", "quantize_*", "failed_*"]
        facts = self.steps.keep_with_rows("smooth", made_of_it, smoothing.of_checkpoint, *given)
        if facts["layers"]:
            writing.remove(self.merged)
            self.merged = smoothed
        return facts

    @property
    def _has_task(self) -> bool:
        return any(path.suffix == ".task" for path in self.bundles)

    def _tokenizer(self) -> dict[str, Any]:
        """Make the SentencePiece model of a `.task`; a `.litertlm` has the original tokenizer."""
        if not self._has_task:
            return tokenizer.original(self.merged).to_dict()
        native = Path(self.base) / "tokenizer.model"
        made = tokenizer.build_sentencepiece(self.merged, self.sentencepiece, native=native)
        return made.to_dict()

    def _write(self, model: Path, path: Path) -> dict[str, Any]:
        """The container that the path's ending names."""
        prompt, room = self.config.prompt, self.config.compress.kv_cache_length
        if path.suffix == ".task":
            return bundle.write_task(model, self.sentencepiece, prompt, path, self.silenced)
        return bundle.write_litertlm(model, self.merged, prompt, path, room)

    def _attempt(self, recipe: str) -> dict[str, Any]:
        """Quantise, bundle and prove; the facts of all three."""
        quantized = self.work / f"{recipe}.tflite"
        if not quantized.exists():
            disk = tflite.bundle_disk(self.parameters, recipe, len(self.bundles))
            machine.check_disk(self.work, disk / 1e9)
        calibrated = calibration.folder(self.work, recipe, self.config)
        parts = self.exact, quantized, recipe, self.merged, calibrated
        found, step = {}, f"quantize_{recipe}"
        if calibrated:
            given = self.config, self.checkpoint, self.merged, recipe, calibrated
            found["calibration"] = self.steps.keep_with_rows(
                f"calibrate_{recipe}", [step], calibration.of_checkpoint, *given
            )
        python = self.config.compress.python
        facts = self.steps.keep(step, tflite.quantize, *parts, python=python)
        found = {"quantize": facts | found}
        made = [self.work / path.name for path in self.bundles]
        found["bundles"] = self.steps.run(
            "bundle", lambda: {path.name: self._write(quantized, path) for path in made}
        )
        if self.samples is None:
            return found
        float_bundle = None
        if self.config.compress.verify.level == "full":
            float_bundle = self.work / f"float{made[0].suffix}"
            if not float_bundle.exists():
                self._write(self.exact, float_bundle)
        found["verify"] = self.steps.run(
            "verify",
            verify.verify_bundle,
            made[0],
            self.merged,
            self.config,
            self.samples,
            replaced=self.replaced,
            work=self.work,
            recipe=recipe,
            silence=self.silenced,
            float_bundle=float_bundle,
            also=made[1] if made[1:] else None,
        )
        return found
