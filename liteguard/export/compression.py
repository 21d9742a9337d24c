"""What one call of compress_model.py makes, and all that it needs: known before the work."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from liteguard import checkpoints, models, shown
from liteguard.config import CompressSection, Config, flatten
from liteguard.errors import UserError
from liteguard.export import gguf_file, measured, outputs, possible, quantization, tflite
from liteguard.export.conversion import Conversion
from liteguard.export.measured import Samples
from liteguard.records import BundleRecord, StageRecord


@dataclass(frozen=True)
class Compression:
    """A finished stage, the bundles to be made of it, and how."""

    config: Config
    checkpoint: Path
    record: StageRecord  # of the checkpoint
    base: str  # directory of the base model
    revision: str | None
    identity: str  # of the base: `models.base_identity`
    parameters: int
    converter: Literal["v1", "v2"]
    recipes: list[str]  # to be tried, in this order
    bundles: list[Path]  # the first is proven whole
    gguf: Path | None  # to be written beside them
    samples: Samples | None  # rows of the proof; None for no proof
    disk: int  # bytes

    def __str__(self) -> str:
        files = [*self.bundles, self.gguf] if self.gguf else self.bundles
        return (
            f"merge, convert ({self.converter}, {' then '.join(self.recipes)}) and write "
            f"{', '.join(map(str, files))}; proof: {self.config.compress.verify.level}"
        )

    @property
    def inputs(self) -> dict[str, Any]:
        """Everything that the bundles depend on; those of the same inputs are reused."""
        section = self.config.compress
        return {
            "adapter": self.record.adapter,
            "base": self.identity,
            "prompt": self.record.prompt.model_dump(),
            **flatten(section.model_dump(exclude={"python"}), "compress."),
            "compress.prefill_lengths": section.ladder,
        }

    def require_resources(self) -> None:
        """Raise UserError where memory or disk do not suffice; what an earlier run left counts."""
        disk = self.disk - checkpoints.left_over(self.bundles[0])
        tflite.require_resources(self.parameters, self.converter, self.bundles[0].parent, disk)

    def run(self, folder: Path, started: float) -> BundleRecord:
        """All steps into the work directory; returns the record of the bundles there.

        `started`: when the command began, as `time.time()` has it.
        """
        conversion = Conversion(
            self.config,
            self.checkpoint,
            self.base,
            self.revision,
            self.parameters,
            self.converter,
            self.recipes,
            self.bundles,
            self.samples,
            folder,
        )
        facts = conversion.run()
        made = [folder / path.name for path in self.bundles]
        return BundleRecord(
            stage="bundle",
            base_model=self.config.model.name,
            base_revision=self.revision,
            base_identity=self.identity,
            base_licence=self.config.model.licence,
            parent=str(self.checkpoint),
            parent_adapter_sha256=self.record.adapter,
            data_dir=self.record.data_dir,
            prompt=self.config.prompt,
            config=self.config.model_dump(),
            inputs=self.inputs,
            files={path.name: checkpoints.sha256_file(path) for path in made},
            bytes={path.name: path.stat().st_size for path in made},
            **facts,
            timings_s=conversion.steps.timings,
            wall_s=round(time.time() - started, 1),
            peak_rss_gb=conversion.steps.peaks,
        )


def plan(
    config: Config, checkpoint: Path, record: StageRecord, wanted: list[Path], gguf: bool
) -> Compression:
    """Look at the model, the rows and the files, and say what the work needs.

    Args:
        checkpoint: a finished stage 3.
        record: its record.
        wanted: the containers asked for (`outputs.containers`).
        gguf: whether a GGUF is written beside them.

    Raises UserError where none of them can be made, or one would replace what it must not.
    """
    section, data_dir = config.compress, Path(record.data_dir)
    base, revision, architecture = models.model_config(config)
    identity = models.base_identity(base, revision)
    checkpoints.require_same(checkpoint, record, config.prompt, identity, config.model.name)
    own = models.load_base_tokenizer(config)
    can = possible.possible(config, architecture, own, base, data_dir)
    bundles = [path for path in wanted if not can.why_not(path.suffix)]
    if not bundles:
        raise UserError(f"{checkpoint}: {can}. Name an --output that can be made.")
    print(can)
    outputs.check(bundles)
    beside = bundles[0].with_suffix(".gguf") if gguf else None
    if beside:
        gguf_file.check(beside, architecture, own)
    samples = None
    if section.verify.level != "none":
        samples = measured.collect_samples(config, data_dir, own.backend_tokenizer)
    converter = tflite.choose_converter(section.converter, section.python)
    parameters = models.count_parameters(architecture)
    recipes = quantization.recipes_for(section, architecture)
    disk = tflite.whole_disk(parameters, converter, recipes[0], len(bundles))
    _say_needs(section, parameters, converter, disk)
    return Compression(
        config,
        checkpoint,
        record,
        base,
        revision,
        identity,
        parameters,
        converter,
        recipes,
        bundles,
        beside,
        samples,
        disk,
    )


def _say_needs(
    section: CompressSection, parameters: int, converter: Literal["v1", "v2"], disk: int
) -> None:
    memory, _ = tflite.required_resources(parameters, converter)
    print(
        f"prefill lengths: {', '.join(map(str, section.ladder))}; KV cache: "
        f"{section.kv_cache_length} tokens\n"
        f"expected peak memory: {tflite.peak_memory(parameters, converter) / 1e9:.1f} GB; "
        f"{memory / 1e9:.1f} GB must be free, and {shown.size(disk)} of disk"
    )
