"""A stage from its inputs to its directory: what it starts from, the model, what is saved."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from liteguard import checkpoints, distributed, doctor_gpu, hub, machine, models, records, shown
from liteguard.config import Config, TrainSection
from liteguard.errors import UserError, WorkError
from liteguard.machine import gpu_memory_gb, library_versions
from liteguard.progress import ticking
from liteguard.records import StageRecord
from liteguard.rows import again, read_manifest
from liteguard.training import isolation, validation

PART = {"domain": "domain", "instruction": "instruction", "safety": "preference"}
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
STORED = {"nf4": "stored as nf4", "none": "not quantised"}
# Settings that finished stages may not know, at the values that these were made with.
LATER = {"use_rslora": False, "neftune_noise_alpha": None, "preference_loss": "sigmoid"}


@dataclass(kw_only=True)
class Stage:
    """A stage that is planned: everything known before the work starts."""

    name: str
    config: Config
    output: Path
    data_dir: Path
    parent: Path | None
    base_directory: str
    base_revision: str | None
    architecture: Any  # the base model's transformers config
    inputs: dict[str, Any]
    rows: dict[str, int]  # of the prepared train and validation splits
    started: float = field(default_factory=time.time)

    @property
    def section(self) -> TrainSection:
        return getattr(self.config, self.name)

    @property
    def storage(self) -> str:
        """How the frozen base is stored in this stage: 'nf4' or 'none' (16 or 32 bit)."""
        return self.section.quantization or self.config.model.quantization

    def open(self, overwrite: bool) -> Run | None:
        """The stage with its work directory, which the main process makes or finds.

        None, said on the screen, when the output is finished and was made from the same inputs.
        """
        work = distributed.on_main(checkpoints.open_work, self.output, self.inputs, overwrite)
        if work is None:
            print(f"{self.output} is finished and was made from the same inputs: reused")
            return None
        if "wandb" not in self.section.report_to:
            # TRL imports it wherever it is installed, which takes seconds.
            sys.modules.setdefault("wandb", None)  # type: ignore[arg-type]
        return self.at(work)

    def at(self, work: Path) -> Run:
        """The stage with `work` as its work directory."""
        return Run(**vars(self), work=work)


@dataclass(kw_only=True)
class Run(Stage):
    """A stage at work."""

    work: Path


def check_gpus(name: str) -> None:
    """Raise UserError for several GPUs in one process, which the trainer refuses only later.

    A GPU that torch cannot use is said: it would train on the CPU without a word.
    """
    import torch

    if warning := doctor_gpu.warning_of_unused():
        print(warning)
    if torch.cuda.device_count() > 1 and distributed.world_size() == 1:
        raise UserError(
            f"{torch.cuda.device_count()} GPUs are visible to one process. Use one of them with "
            f"CUDA_VISIBLE_DEVICES=0 python train_{name}.py ..., or all with\n"
            f"accelerate launch --config_file configs/accelerate/ddp.yaml train_{name}.py ..."
        )


def plan(
    name: str,
    config: Config,
    output: Path,
    data_dir: Path,
    parent: Path | None = None,
    overwrite: bool = False,
    flags: Sequence[str] = (),
) -> Stage:
    """Check everything a stage needs: data, base model, parent; nothing heavy is loaded.

    flags: those that name the configuration, for a message (`rows.read_manifest`).
    Raises UserError when the parent was trained on another base model or with another prompt, and
    for an output that would not be replaced.
    """
    checkpoints.check_output(output, {"stage": name})
    if parent is None:
        _follow_earlier_run(output, overwrite)
    if base := models.hub_model(config):
        # Every process takes the commit that the main one found.
        hub.remember(base, distributed.on_main(hub.commit, base))
        read_manifest(data_dir, flags)  # or gigabytes would be downloaded in vain
    return _plan(name, config, output, data_dir, parent, flags)


def _follow_earlier_run(output: Path, overwrite: bool) -> None:
    """Let a stage 1 that is run again use the base model's commit that it began with."""
    begun = checkpoints.begun_from(checkpoints.work_directory(output))
    if begun is None and not overwrite:
        with contextlib.suppress(UserError):
            begun = records.read(StageRecord, output / checkpoints.RECORD).inputs
    name, asked, base = map((begun or {}).get, ("base_model", "base_asked", "base"))
    if isinstance(base, str):
        hub.follow("model", name, asked, base.removeprefix("commit:"))


@distributed.main_first
def _plan(
    name: str,
    config: Config,
    output: Path,
    data_dir: Path,
    parent: Path | None,
    flags: Sequence[str],
) -> Stage:
    missing = [
        tool for tool in getattr(config, name).report_to if importlib.util.find_spec(tool) is None
    ]
    if missing:
        raise UserError(
            f"{name}.report_to names {', '.join(missing)}, which is not installed. "
            f"Run: pip install {' '.join(missing)}"
        )
    distributed.accumulation(getattr(config, name).gradient_accumulation, name)
    check_gpus(name)
    directory, revision, loaded = models.model_config(config)
    manifest = read_manifest(data_dir, flags)
    identity = models.base_identity(directory, revision)
    parent_hash = None
    if parent is not None:
        record = checkpoints.read_stage(parent, checkpoints.STAGES[name][0])
        checkpoints.require_same(parent, record, config.prompt, identity, config.model.name)
        parent_hash = record.adapter
    part = PART[name]
    section = config.model_dump()[name]
    storage = section.pop("quantization") or config.model.quantization
    section.pop("report_to")
    inputs = {
        "stage": name,
        "base": identity,
        "parent": parent_hash,
        "quantization": storage,
        "compute_dtype": config.model.compute_dtype,
        "context_length": config.model.context_length,  # bounds max_length
        **{
            f"data/{s}": manifest["files"].get(f"{part}/{s}.jsonl") for s in ("train", "validation")
        },
        **{
            f"{name}.{key}": value for key, value in section.items() if LATER.get(key, ...) != value
        },
        **{
            f"prompt.{key}": value
            for key, value in config.prompt.model_dump().items()
            if value or key != "bos_token"  # which older stages do not have
        },
    }
    if revision:  # what the commit was resolved from
        inputs |= {"base_model": config.model.name, "base_asked": config.model.revision}
    if section["packing"] and (why := isolation.refusal(loaded)):
        print(f"{name}: packing is refused: {why}. Padded rows are trained on (packing: false)")
        padded = getattr(config, name).model_copy(update={"packing": False})
        config = config.model_copy(update={name: padded})
    return Stage(
        name=name,
        config=config,
        output=output,
        data_dir=data_dir,
        parent=parent,
        base_directory=directory,
        base_revision=revision,
        architecture=loaded,
        inputs=inputs,
        rows={s: _rows(data_dir, f"{part}/{s}.jsonl") for s in ("train", "validation")},
    )


def _rows(data_dir: Path, name: str) -> int:
    counts = read_manifest(data_dir)["counts"]
    if name not in counts:
        raise UserError(
            f"the prepared data's manifest.json does not count {name}. {again(data_dir)}"
        )
    return counts[name]["rows"]


def load_tokenizer(stage: Stage) -> Any:
    """The parent's tokenizer, or the base model's in the first stage."""
    return models.load_tokenizer(
        str(stage.parent or stage.base_directory),
        stage.config.prompt,
        stage.architecture.get_text_config().vocab_size,
        None if stage.parent else stage.base_revision,
        stage.config.model.trust_remote_code,
    )


def load_model(stage: Stage) -> Any:
    """The base in NF4 with the parent's adapter, or with a fresh one; only the adapter trains."""
    dtype, reason = models.choose_dtype(
        stage.config.model.compute_dtype, stage.architecture.model_type
    )
    storage = stage.storage
    print(f"precision: {str(dtype).removeprefix('torch.')} ({reason}); base {STORED[storage]}")
    with ticking("loading the base"):
        model = models.load_base(
            stage.config,
            stage.base_directory,
            stage.base_revision,
            dtype,
            quantize=storage == "nf4",
        )
    matched = models.lora_targets(model, stage.config.domain.lora_targets)
    model = (
        models.load_adapter(model, stage.parent, trainable=True)
        if stage.parent
        else models.add_adapter(model, stage.config)
    )
    if stage.section.gradient_checkpointing:
        model.enable_input_require_grads()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    table = ", ".join(f"{layer} x{count}" for layer, count in matched.items())
    print(f"LoRA on {table}: {trainable:,} trainable parameters")
    return model


def last_checkpoint(work: Path) -> Path | None:
    """The newest complete trainer checkpoint: trainer_state.json is what is written last.

    Complete with the best one that it knows, which is what will be published.
    """
    found = []
    for path in (work / "trainer").glob("checkpoint-*"):
        state = checkpoints.read_dict(path / "trainer_state.json")
        known = (state or {}).get("best_model_checkpoint")
        if state is None or not (known is None or isinstance(known, str)):
            shutil.rmtree(path, ignore_errors=True)
            continue
        # Without the best one so far, the trainer would end with the last one's adapter.
        best = Path(known or path).name
        needed = [path / name for name in ADAPTER_FILES]
        needed += [path.with_name(best) / name for name in ADAPTER_FILES]
        if all(file.is_file() for file in needed):
            if known and not Path(known).is_dir():
                # The directory was moved: the trainer would forget its best step without a word.
                state["best_model_checkpoint"] = str(path.with_name(best))
                checkpoints.write_json(path / "trainer_state.json", state)
            found.append((int(path.name.rsplit("-", 1)[1]), path))
    return max(found)[1] if found else None


def check_saved_adapter(model: Any, path: Path) -> None:
    """Raise WorkError unless the file has both matrices of every layer that was trained.

    What a wrapper round the model does to the names of its layers can leave an adapter without
    tensors (distributed.keep_adapters_under_fsdp), which loads later as one that changes nothing.
    """
    from peft.tuners.lora import LoraLayer
    from safetensors import safe_open

    layers = sum(
        isinstance(module, LoraLayer) and "default" in (*module.lora_A, *module.lora_embedding_A)
        for module in model.modules()
    )
    with safe_open(path, framework="pt") as file:
        saved = sum("lora_" in name for name in [*file.keys()])
    if saved != 2 * layers:
        raise WorkError(
            f"{path} has {saved} LoRA matrices, but {layers} layers were trained, with two each. "
            "The trainer's checkpoints beside it may be as incomplete. Please report this with the "
            "versions of peft, accelerate and torch."
        )


def _name_hub_base(path: Path, stage: Stage) -> None:
    """Let an adapter name its base model and commit on the hub, not a directory of this machine."""
    base = {"base_model_name_or_path": stage.config.model.name, "revision": stage.base_revision}
    checkpoints.write_json(path, json.loads(path.read_text(encoding="utf-8")) | base)


def finish(stage: Run, trainer: Any, tokenizer: Any, metrics: dict[str, Any]) -> str:
    """Save adapter, tokenizer, curves and stage.json, and give the directory its final name.

    Returns what was made, how good it is and how long it took, in a line.
    """
    work = stage.work
    probe = validation.probe_rows(trainer)
    with trainer.compute_loss_context_manager():
        trained = validation.mean_loss(trainer.model, probe)
    # A sharded model is gathered by all processes; one of them writes.
    state = trainer.accelerator.get_state_dict(trainer.model) if distributed.uses_fsdp() else None
    if not distributed.is_main():
        distributed.barrier()
        return ""
    model = trainer.accelerator.unwrap_model(trainer.model)
    # DPO adds a frozen copy named "ref"; only the trained adapter is a result.
    model.save_pretrained(
        str(work), state_dict=state, selected_adapters=["default"], safe_serialization=True
    )
    check_saved_adapter(model, work / "adapter_model.safetensors")
    if stage.base_revision:
        _name_hub_base(work / "adapter_config.json", stage)
    # save_pretrained makes a README.md from the hub's template, which says nothing true here.
    (work / "README.md").unlink(missing_ok=True)
    tokenizer.save_pretrained(str(work))
    checkpoints.write_json(work / "log_history.json", trainer.state.log_history)
    plot_curves(trainer.state.log_history, work / "curves.png", stage.name)
    if not distributed.uses_fsdp():  # whose shards are small, and not a tensor of their own each
        validation.release(model)
    metrics = {**metrics, "both_bases": both_bases(stage, probe, trained)}
    config = stage.config
    record = StageRecord(
        stage=stage.name,
        base_model=config.model.name,
        base_revision=stage.base_revision,
        base_identity=stage.inputs["base"],
        parent=str(stage.parent) if stage.parent else None,
        parent_adapter_sha256=stage.inputs["parent"],
        data_dir=str(stage.data_dir),
        rows=stage.rows,
        prompt=config.prompt,
        config=config.model_dump(),
        config_sources=config.sources,
        metrics=metrics,
        processes=distributed.world_size(),
        lora={
            name: getattr(model.peft_config["default"], name)
            for name in ("r", "lora_alpha", "use_rslora")
        },
        versions=library_versions(),
        wall_s=round(time.time() - stage.started, 1),
        peak_rss_gb=machine.peak_rss_gb(),
        peak_gpu_memory_gb=gpu_memory_gb(),
        inputs={},  # these two are filled in by `publish`, from what lies in the directory
        files={},
    )
    tokenizer_files = [
        name
        for name in (
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
            "special_tokens_map.json",
            "vocab.json",
            "merges.txt",
            "added_tokens.json",
        )
        if (work / name).is_file()
    ]
    files = [*ADAPTER_FILES, *tokenizer_files, "log_history.json", "curves.png"]
    checkpoints.publish(work, stage.output, record.model_dump(), files)
    distributed.barrier()
    return closing(stage.output, record, trainer.state.log_history)


def closing(output: Path, record: StageRecord, history: list[dict[str, Any]]) -> str:
    """What a stage made, how good it is and how long it took, in a line."""
    size = shown.size((output / ADAPTER_FILES[1]).stat().st_size)
    bases = record.metrics["both_bases"]
    found = bases["shipped_perplexity"] or bases["trained_perplexity"]
    good = f"validation perplexity {found:.2f}"
    pairs = [entry for entry in history if "eval_rewards/accuracies" in entry]
    if pairs:
        best = min(pairs, key=lambda entry: entry["eval_loss"])
        good += f", {best['eval_rewards/accuracies']:.0%} of validation pairs told apart"
    return (
        f"wrote {output}: adapter of rank {record.lora['r']} ({size}), {good}; "
        f"{shown.duration(record.wall_s)}"
    )


def both_bases(stage: Run, probe: validation.Rows, trained: float) -> dict[str, Any]:
    """The saved adapter's validation loss on the base it was trained on and on the one that ships.

    Stages train against an NF4 copy of the base, which for a small model is another model; the
    adapter is merged into the 16-bit one.
    """
    parameters = models.count_parameters(stage.architecture)
    with ticking("scoring on the 16-bit base"):
        shipped = validation.shipped_loss(stage.config, stage.work, parameters, probe)
    found: dict[str, Any] = {
        "rows": len(probe),
        "tokens": sum(int((labels[1:] != -100).sum()) for _, labels in probe),
        "storage": stage.storage,
        "trained_loss": trained,
        "shipped_loss": shipped,
    }
    for name in ("trained", "shipped"):
        loss = found[f"{name}_loss"]
        found[f"{name}_perplexity"] = None if loss is None else math.exp(loss)
    print(
        f"{stage.name}: perplexity of {found['rows']} validation rows ({found['tokens']:,} tokens) "
        f"{found['trained_perplexity']:.2f} on the base as trained on ({STORED[stage.storage]})"
        + ("" if shipped is None else f", {math.exp(shipped):.2f} on the 16-bit base that ships")
    )
    return found


def plot_curves(history: list[dict[str, Any]], path: Path, title: str) -> None:
    """Training and validation loss (and DPO margin) over steps, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [("loss", {"loss": "train", "eval_loss": "validation"})]
    if any("rewards/margins" in entry for entry in history):
        panels.append(
            ("reward margin", {"rewards/margins": "train", "eval_rewards/margins": "validation"})
        )
    panels.append(("learning rate", {"learning_rate": "learning rate"}))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.4))
    for axis, (label, series) in zip(axes, panels, strict=True):
        for key, name in series.items():
            points = [(e["step"], e[key]) for e in history if key in e]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        axis.set(xlabel="step", ylabel=label)
        axis.grid(alpha=0.3)
        if len(series) > 1:
            axis.legend()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def longest_pairs(tokenizer: Any, pairs: list[dict[str, str]], batch_size: int) -> int:
    """Tokens of a micro-batch of the longest pairs; the longest by characters are counted."""
    longest = sorted(pairs, key=lambda pair: -sum(map(len, pair.values())))[: 4 * batch_size]
    counts = [
        sum(len(models.encode(tokenizer, pair["prompt"] + pair[a])) for a in ("chosen", "rejected"))
        for pair in longest
    ]
    return sum(sorted(counts)[-batch_size:])
