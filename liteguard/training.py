"""What the three training stages share: inputs, trainer arguments, progress, resume, saving."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import math
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liteguard import (
    checkpoints,
    datasets,
    distributed,
    hub,
    machine,
    memory,
    models,
    packing,
    sources,
    tokens,
    tracking,
    validation,
)
from liteguard.config import Config, SafetySection, TrainSection, flatten
from liteguard.errors import UserError, WorkError

if TYPE_CHECKING:
    import numpy as np

PART = {"domain": "domain", "instruction": "instruction", "safety": "preference"}
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass
class Stage:
    """One run of a stage: everything known before the work starts."""

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
    work: Path | None = None
    started: float = field(default_factory=time.time)

    @property
    def section(self) -> TrainSection:
        return getattr(self.config, self.name)

    @property
    def storage(self) -> str:
        """How the frozen base is stored in this stage: 'nf4' or 'none' (16 or 32 bit)."""
        return self.section.quantization or self.config.model.quantization


def check_gpus(name: str) -> None:
    """Raise UserError for several GPUs in one process, which the trainer refuses only later."""
    import torch

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
) -> Stage:
    """Check everything a stage needs: data, base model, parent; nothing heavy is loaded.

    Raises UserError when the parent was trained on another base model or with another prompt.
    """
    if parent is None:
        _follow_earlier_run(output, overwrite)
    if base := sources.hub_model(config):
        # Every process takes the commit that the main one found.
        hub.remember(base, distributed.on_main(hub.commit, base))
        datasets.read_manifest(data_dir)  # or gigabytes would be downloaded in vain
    return _plan(name, config, output, data_dir, parent)


def _follow_earlier_run(output: Path, overwrite: bool) -> None:
    """Let a stage 1 that is run again use the base model's commit that it began with."""
    begun = checkpoints.begun_from(checkpoints.work_directory(output))
    if begun is None and not overwrite:
        with contextlib.suppress(OSError, ValueError, KeyError):
            record = (output / checkpoints.RECORD).read_text(encoding="utf-8")
            begun = json.loads(record)["inputs"]
    if begun is not None and begun.get("base_model"):
        base = hub.Repository("model", begun["base_model"], begun["base_asked"])
        hub.remember(base, begun["base"].removeprefix("commit:"))


@distributed.main_first
def _plan(
    name: str, config: Config, output: Path, data_dir: Path, parent: Path | None = None
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
    manifest = datasets.read_manifest(data_dir)
    identity = models.base_identity(directory, revision)
    parent_hash = None
    if parent is not None:
        record = checkpoints.read_stage(parent, checkpoints.STAGES[name][0])
        parent_hash = record["files"]["adapter_model.safetensors"]
        if record["base_identity"] != identity:
            raise UserError(
                f"{parent} was trained on another base model ({record['base_model']}, "
                f"{record['base_identity'][:24]}...) than this configuration names "
                f"({config.model.name}, {identity[:24]}...). One adapter belongs to one base model."
            )
        if record["prompt"] != config.prompt.model_dump():
            changes = checkpoints.describe_changes(record["prompt"], config.prompt.model_dump())
            raise UserError(
                f"{parent} was made with another prompt than this configuration has:\n"
                + "\n".join(changes)
                + "\nA model answers in the prompt it was trained with: put the old values back, "
                "or train again from stage 1."
            )
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
        **{f"{name}.{key}": value for key, value in section.items()},
        **{f"prompt.{key}": value for key, value in config.prompt.model_dump().items()},
    }
    if revision:  # what the commit was resolved from
        inputs |= {"base_model": config.model.name, "base_asked": config.model.revision}
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
        rows={s: manifest["counts"][f"{part}/{s}.jsonl"]["rows"] for s in ("train", "validation")},
    )


def load_tokenizer(stage: Stage) -> Any:
    """The parent's tokenizer, or the base model's in the first stage."""
    return models.load_tokenizer(
        str(stage.parent or stage.base_directory),
        stage.config.prompt,
        stage.architecture.vocab_size,
        None if stage.parent else stage.base_revision,
        stage.config.model.trust_remote_code,
    )


def load_model(stage: Stage) -> Any:
    """The base in NF4 with the parent's adapter, or with a fresh one; only the adapter trains."""
    dtype, reason = models.choose_dtype(
        stage.config.model.compute_dtype, stage.architecture.model_type
    )
    storage = stage.storage
    print(f"precision: {str(dtype).removeprefix('torch.')} ({reason}); base stored as {storage}")
    model = models.load_base(
        stage.config, stage.base_directory, stage.base_revision, dtype, quantize=storage == "nf4"
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


@dataclass
class Counts:
    """What each optimizer step of a run computes, over all processes; shape (max_steps,) each."""

    tokens: np.ndarray  # of examples, prompts included, padding not
    supervised: np.ndarray  # tokens that the loss is about
    padding: np.ndarray  # padding tokens that the model runs on
    chosen: np.ndarray | None = None  # of `supervised`, tokens of chosen answers (stage 3)


@dataclass
class Feed:
    """What the trainer of stage 1 or 2 is fed: micro-batches of row numbers, and their tokens."""

    train: Any  # datasets.Dataset of {"part", "rows"}, one item a micro-batch, in order
    evaluation: Any
    collator: packing.Collator
    accumulation: int  # micro-batches of one process in an optimizer step
    counts: Counts

    def arguments(self) -> dict[str, Any]:
        """What replaces `trainer_arguments`' batch sizes."""
        return {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": self.accumulation,
            # Sequences arrive tokenized, with their labels.
            "dataset_kwargs": {"skip_prepare_dataset": True},
        }


def feed(stage: Stage, tokenizer: Any, train: tokens.TokenRows, held_out: tokens.TokenRows) -> Feed:
    """Plan every micro-batch of a run of stage 1 or 2.

    A step of the domain stage takes as many texts as fit its `batch_size` x
    `gradient_accumulation` x `max_length` tokens; one of the instruction stage takes
    `batch_size` x `gradient_accumulation` rows. Either way they are spread over as few
    micro-batches as `micro_batch_tokens` allows.
    """
    import numpy as np
    from datasets import Dataset

    section, lengths = stage.section, train.lengths
    rows_per_step = section.batch_size * section.gradient_accumulation
    order = packing.repeat_order(len(train), section.seed, shuffle_first=stage.name == "domain")
    if stage.name == "domain":
        budget = rows_per_step * min(section.max_length, stage.config.model.context_length)
        steps = packing.steps_of_tokens(order, lengths, budget, section.max_steps)
    else:
        steps = packing.steps_of_rows(order, rows_per_step, section.max_steps)
    processes = distributed.world_size()
    if section.packing:
        capacity = micro_batch_tokens(stage, lengths)
        try:
            batches, count = packing.micro_batches(steps, lengths, capacity, processes)
        except UserError:
            if stage.name != "domain":
                raise
            # Long texts that fill a micro-batch alone: fewer of them a step.
            order = packing.repeat_order(len(train), section.seed, shuffle_first=True)
            groups = max(budget // capacity // processes, 1) * processes
            steps = packing.steps_of_groups(order, lengths, capacity, groups, section.max_steps)
            batches, count = packing.micro_batches(steps, lengths, capacity, processes)
    else:
        batches, count = packing.padded_micro_batches(steps, lengths, section.batch_size, processes)
    sizes = np.array([[lengths[b].sum(), len(b) * lengths[b].max()] for b in batches])
    per_step = sizes.reshape(len(steps), count, 2).sum(1)
    supervised = train.supervised
    items = {"part": ["train"] * len(batches), "rows": batches}
    reduction = getattr(section, "loss_reduction", "token")
    if reduction != "token":
        weights = packing.row_weights(steps, supervised, reduction)
        of_row = [dict(zip(s, w, strict=True)) for s, w in zip(steps, weights, strict=True)]
        items["weights"] = [[of_row[i // count][row] for row in b] for i, b in enumerate(batches)]
    return Feed(
        train=Dataset.from_dict(items),
        evaluation=Dataset.from_dict(
            {
                "part": ["validation"] * len(held_out),
                "rows": [[row] for row in range(len(held_out))],
            }
        ),
        collator=packing.Collator({"train": train, "validation": held_out}, tokenizer.pad_token_id),
        accumulation=count // processes,
        counts=Counts(
            tokens=per_step[:, 0],
            supervised=np.array([supervised[step].sum() for step in steps]),
            padding=(per_step[:, 1] - per_step[:, 0]) * (not section.packing),
        ),
    )


def pair_order(section: TrainSection, pairs: int) -> list[int]:
    """The pairs of a run of stage 3 in order, `batch_size` x `gradient_accumulation` a step.

    The first pass keeps their order, the mixture; further ones are shuffled, as in stage 2.
    """
    order = packing.repeat_order(pairs, section.seed, shuffle_first=False)
    return list(itertools.islice(order, needed_rows(section)))


def pair_counts(stage: Stage, pairs: Any) -> Counts:
    """Counts of a stage-3 run over `pairs` (TRL's tokenized dataset), taken in `pair_order`."""
    import numpy as np

    section = stage.section
    rows = pair_order(section, len(pairs))
    prompt, chosen, rejected = (
        np.array([len(ids) for ids in pairs[f"{name}_ids"]])[rows]
        for name in ("prompt", "chosen", "rejected")
    )
    widest = (prompt + np.maximum(chosen, rejected)).reshape(-1, section.batch_size).max(1)
    fed = 2 * section.batch_size * widest.reshape(section.max_steps, -1).sum(1)
    real, supervised, chosen = (
        lengths.reshape(section.max_steps, -1).sum(1)
        for lengths in (2 * prompt + chosen + rejected, chosen + rejected, chosen)
    )
    return Counts(real, supervised, (fed - real) * (not section.packing), chosen)


# Enough for full speed of the matrix products on a CPU. 1024 tokens took 0.7 GB more for SmolLM2 in
# float32 and 1 to 6 % less time (docs/experiments.md).
CPU_MICRO_BATCH_TOKENS = 512


def micro_batch_tokens(stage: Stage, lengths: np.ndarray) -> int:
    """Most tokens of a micro-batch: what the configuration allows padded rows to take, at most."""
    import torch

    section = stage.section
    allowed = section.batch_size * min(section.max_length, stage.config.model.context_length)
    if torch.cuda.is_available():
        return allowed
    return min(allowed, max(CPU_MICRO_BATCH_TOKENS, int(lengths.max())))


def kind_weights(section: SafetySection, rows: list[dict]) -> dict[str, float]:
    """The weight of each kind of pairs that `safety.kind_weights` means, given the train rows.

    It sets where stage 3 leaves the line between helping and refusing. Raises UserError for a kind
    that no pair is of.
    """
    kinds = Counter(row.get("kind") for row in rows)
    if section.kind_weights == "prepared":
        return dict(kinds)
    unknown = {*section.kind_weights} - {*kinds}
    if unknown:
        raise UserError(
            f"safety.kind_weights names {', '.join(map(repr, sorted(unknown)))}, and no preference "
            f"pair is of that kind. Kinds in the data: {', '.join(sorted(map(str, kinds)))}"
        )
    return section.kind_weights


def render_preferences(
    tokenizer: Any,
    rows: list[dict],
    config: Config,
    part: str,
    limit: int,
    weights: dict[str, float],
    sources: dict[str, str],
) -> list[dict[str, str]]:
    """Up to `limit` pairs as rendered text (prompt, chosen, rejected), kinds taking turns by
    `weights`; prints the mixture.

    Pairs longer than `safety.max_length` are left out, because the trainer would cut the end of
    their answers; more than 1 % of them is an error. sources: see `datasets.source_titles`.
    """
    length = min(config.safety.max_length, config.model.context_length)
    prompt = config.prompt
    kept, used, lost = [], [], 0
    for row in balanced(rows, "kind", len(rows), weights):
        rendered = {
            "prompt": prompt.render_question(row["prompt"]),
            "chosen": prompt.render_answer(row["chosen"]),
            "rejected": prompt.render_answer(row["rejected"]),
        }
        ids = {key: len(models.encode(tokenizer, text)) for key, text in rendered.items()}
        if ids["prompt"] + max(ids["chosen"], ids["rejected"]) > length:
            lost += 1
            continue
        kept.append(rendered)
        used.append(row)
        if len(kept) == limit:
            break
    if lost > 0.01 * (lost + len(kept)):
        raise UserError(
            f"{lost} of {lost + len(kept)} {part} preference pairs are longer than "
            f"safety.max_length = {length} tokens. Raise it or shorten the answers."
        )
    print(f"{part} pairs: {mixture(used, rows, sources)}")
    return kept


def mixture(used: list[dict], rows: list[dict], sources: dict[str, str]) -> str:
    """Kinds and sources of the pairs that are `used`, and how many of its `rows` a source has.

    A kind that runs out leaves its turns to the others, so shares may not be those asked for.
    """
    kinds = Counter(str(row.get("kind")) for row in used)
    shares = ", ".join(f"{kind} {n:,} ({n / len(used):.0%})" for kind, n in kinds.most_common())
    taken, there = (
        Counter(sources.get(row.get("dataset"), "unknown") for row in some) for some in (used, rows)
    )
    origins = ", ".join(
        f"{name} {n / len(used):.0%} ({n:,} of its {there[name]:,})"
        for name, n in taken.most_common()
    )
    return f"{shares}; sources: {origins}"


def balanced(
    rows: list[dict], key: str, limit: int, weights: dict[str, float] | None = None
) -> list[dict]:
    """Up to `limit` rows, the groups that `key` makes taking turns by their weights (default 1).

    The order within a group is kept; a group that runs out leaves its turns to the others.
    """
    groups: dict[Any, list[dict]] = {}
    for row in rows:
        groups.setdefault(row.get(key), []).append(row)
    due = [
        ((rank + 0.5) / (weights or {}).get(name, 1.0), str(name), rank, row)
        for name, members in groups.items()
        for rank, row in enumerate(members)
    ]
    return [entry[3] for entry in sorted(due, key=lambda entry: entry[:3])[:limit]]


def restore_precision(model: Any, stage: Stage) -> None:
    """The trained adapter back in float32, with the parent's exact values.

    TRL 1.16 rounds the adapter of a quantised base to bfloat16, which has 8 significant bits: a
    weight of 0.02 has neighbours 1.2e-4 away, and an AdamW step of 1e-5 rounds back to where it
    was. Most of a stage 2 at Phi's learning rate would be lost without any sign (measured in
    docs/experiments.md), and DPO's policy would start beside its reference, which is copied before
    the rounding. Activations still run in the compute dtype, by autocast.
    """
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if stage.parent is None:
        return
    with torch.no_grad():
        for name, (tensor, policy) in _saved_adapter(model, stage, "default").items():
            if policy is None:
                raise WorkError(f"{stage.parent}: {name} has no place in the model.")
            policy.copy_(tensor)


def _saved_adapter(model: Any, stage: Stage, adapter: str) -> dict[str, tuple[Any, Any]]:
    """Name in the parent's file -> (saved tensor, the named adapter's parameter or None)."""
    from safetensors.torch import load_file

    parameters = dict(model.named_parameters())
    saved = load_file(str(stage.parent / "adapter_model.safetensors"))
    return {
        name: (tensor, parameters.get(re.sub(r"(\.lora_[AB])\.", rf"\1.{adapter}.", name)))
        for name, tensor in saved.items()
    }


def check_reference(model: Any, stage: Stage) -> None:
    """Raise WorkError unless DPO's policy and reference both equal the parent, tensor by tensor.

    With an equal reference the first loss is ln 2 and the first margins are 0; with the raw base
    model as reference nothing would look wrong.
    """
    import torch

    for adapter, role in (("ref", "reference"), ("default", "policy")):
        for name, (tensor, found) in _saved_adapter(model, stage, adapter).items():
            if found is None or not torch.equal(found.cpu().float(), tensor.float()):
                raise WorkError(
                    f"DPO's {role} is not the policy in {stage.parent}: {name} differs."
                )
            if adapter == "ref" and found.requires_grad:
                raise WorkError(f"DPO's reference is not frozen: {name} would be trained.")
    digest = stage.inputs["parent"][:16]
    print(f"DPO reference: frozen copy of {stage.parent} (adapter sha256 {digest}...)")


def precompute_reference(stage: Stage, trainer: Any) -> None:
    """Compute the reference's log-probabilities once and drop it: one policy is left in memory.

    They are kept in the work directory, so that a resumed run does not compute them again.
    """
    import torch
    from safetensors.torch import load_file, save_file
    from torch.utils.data import DataLoader
    from tqdm import tqdm

    path = stage.work / "reference.safetensors"
    sets = {"train": trainer.train_dataset, "validation": trainer.eval_dataset}

    def compute() -> None:
        found = {}
        for name, rows in sets.items():
            batches = DataLoader(
                rows, batch_size=stage.section.batch_size, collate_fn=trainer.data_collator
            )
            scores = []
            for batch in tqdm(batches, desc=f"reference, {name}", disable=None):
                batch = {key: value.to(trainer.model.device) for key, value in batch.items()}
                scores.append(torch.stack(trainer.compute_ref_log_probs(trainer.model, batch)))
            both = torch.cat(scores, dim=1).float().cpu()
            found[f"{name}.chosen"], found[f"{name}.rejected"] = (row.clone() for row in both)
        staging = path.with_name(f".{path.name}.tmp")
        save_file(found, str(staging))
        staging.replace(path)

    if not path.exists():
        trainer.model.eval()
        distributed.on_main(compute)
        trainer.model.train()
    stored = load_file(str(path))
    with_scores = {
        name: rows.add_column("ref_chosen_logps", stored[f"{name}.chosen"].tolist()).add_column(
            "ref_rejected_logps", stored[f"{name}.rejected"].tolist()
        )
        for name, rows in sets.items()
    }
    trainer.train_dataset, trainer.eval_dataset = with_scores.values()
    trainer.precompute_ref_logps = True
    trainer.accelerator.unwrap_model(trainer.model).delete_adapter("ref")
    print(f"reference: {sum(map(len, sets.values()))} pairs scored once, then dropped from memory")


# Attributes by which a model's head does more than one linear layer; TRL knows how, ours does not.
_SPECIAL_HEADS = (
    "final_logit_softcapping",
    "logit_scale",
    "output_multiplier",
    "lm_head_multiplier",
    "logits_scaling",
    "output_router_logits",
)


def score_targets_only(trainer: Any) -> bool:
    """On a CPU, compute logits at supervised positions only; returns whether that was set up.

    TRL 1.16 does so on devices with Triton. Elsewhere it runs every position, prompts and padding
    included, through the vocabulary in its own tiles, which took about half of a stage-2 step on
    two cores. Same loss and gradients: tests/test_training.py compares them.
    """
    from trl.trainer.utils import FusedCausalLMOutput

    from liteguard.head import TargetScores

    model = trainer.accelerator.unwrap_model(trainer.model).get_base_model()
    text_config = model.config.get_text_config()
    special = any(getattr(text_config, name, None) for name in _SPECIAL_HEADS)
    if special or model.device.type != "cpu":
        return False
    original = model.forward

    def forward(
        *args: Any,
        fused_lm_head: bool = False,
        labels: Any = None,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head:
            return original(*args, labels=labels, **kwargs)
        kwargs["use_cache"] = False
        hidden = model.base_model(*args, **kwargs).last_hidden_state[:, :-1]
        mask = labels[:, 1:] != -100
        head = model.get_output_embeddings()
        log_probs, entropy, mean_logits, is_top1 = TargetScores.apply(
            hidden[mask], head.weight, head.bias, labels[:, 1:][mask]
        )

        def spread(values: Any) -> Any:
            return values.new_zeros(mask.shape).masked_scatter(mask, values)

        count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return FusedCausalLMOutput(
            loss=-log_probs.sum() / count,
            log_probs=spread(log_probs),
            entropy=spread(entropy),
            is_top1=spread(is_top1),
            mean_logits=spread(mean_logits),
            label_mask=mask,
        )

    model.forward = forward
    return True


def needed_rows(section: TrainSection) -> int:
    """Rows that `max_steps` optimizer steps consume."""
    return section.max_steps * section.batch_size * section.gradient_accumulation


def trainer_arguments(stage: Stage) -> dict[str, Any]:
    """Arguments that SFTConfig and DPOConfig share, from the stage's section."""
    import torch

    section = stage.section
    dtype, _ = models.choose_dtype(stage.config.model.compute_dtype, stage.architecture.model_type)
    # The best of the evaluated steps is published, so every one of them has a checkpoint. Those of
    # `save_steps` come on top (Guard).
    evaluates = section.eval_steps <= section.max_steps
    save_steps = section.eval_steps if evaluates else section.save_steps
    return {
        "output_dir": str(stage.work / "trainer"),
        "learning_rate": section.learning_rate,
        "max_steps": section.max_steps,
        "per_device_train_batch_size": section.batch_size,
        "per_device_eval_batch_size": section.batch_size,
        "gradient_accumulation_steps": distributed.accumulation(
            section.gradient_accumulation, stage.name
        ),
        "lr_scheduler_type": section.lr_scheduler,
        "warmup_steps": min(section.warmup_steps, max(section.max_steps - 1, 0)),
        "weight_decay": section.weight_decay,
        "max_grad_norm": section.max_grad_norm,
        "optim": section.optimizer,
        "gradient_checkpointing": section.gradient_checkpointing,
        "logging_steps": section.logging_steps,
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": section.eval_steps,
        "save_strategy": "steps",
        "save_steps": save_steps,
        "save_total_limit": section.save_total_limit,
        "load_best_model_at_end": evaluates,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "report_to": [],  # see tracking.py
        "seed": section.seed,
        "data_seed": section.seed,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": True,
        # Rows come in the order that was planned: mixed by preparation, kinds taking turns.
        "train_sampling_strategy": "sequential",
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "remove_unused_columns": False,
        "max_length": min(section.max_length, stage.config.model.context_length),
        "pad_token": stage.config.prompt.pad_token,
    }


def callbacks(stage: Stage) -> list[Any]:
    """The stop on gradients that are not finite, early stopping, and the guard of stage 3."""
    from transformers import EarlyStoppingCallback, TrainerCallback

    section = stage.section
    arguments = trainer_arguments(stage)

    class Guard(TrainerCallback):
        """Stops a run before it learns from what is not finite, or unlearns its answers."""

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            import torch

            if args.fp16:
                return  # the gradient scaler skips such steps by itself
            found = [p.grad.sum() for p in model.parameters() if p.grad is not None]
            if found and not torch.stack([g.float() for g in found]).sum().isfinite():
                raise _not_finite(stage, f"a gradient in step {state.global_step + 1}")

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % section.save_steps == 0:
                control.should_save = True
            if arguments["load_best_model_at_end"] and state.global_step == state.max_steps:
                # The best checkpoint is chosen among those that were evaluated and saved.
                control.should_evaluate = control.should_save = True

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            if not math.isfinite(metrics.get("eval_loss", 0.0)):
                raise _not_finite(stage, f"the validation loss of step {state.global_step}")
            if unlearns(section, metrics):
                print(
                    f"  {stage.name}: stopped at step {state.global_step}: the chosen answers have "
                    f"lost {_chosen_drop(section, metrics):.1f} nats on validation rows "
                    f"(safety.chosen_drop_limit = {section.chosen_drop_limit}), so this checkpoint "
                    "is not kept as the best. Lower safety.learning_rate, or raise "
                    "safety.sft_weight."
                )
                metrics["eval_loss"] = math.inf  # the trainer compares it right after this
                control.should_training_stop = True

    class Patience(EarlyStoppingCallback):
        """Early stopping that a resumed run goes on counting for."""

        def on_train_begin(self, args, state, control, **kwargs):
            super().on_train_begin(args, state, control, **kwargs)
            self.early_stopping_patience_counter = evaluations_since_best(state.log_history)

    result: list[Any] = [Guard()]
    if section.early_stopping_patience and arguments["load_best_model_at_end"]:
        result.append(Patience(section.early_stopping_patience))
    return result


def _chosen_drop(section: TrainSection, metrics: dict[str, float]) -> float:
    """Nats that the chosen answers have lost: a reward is beta times the distance from the
    reference in log-probability."""
    return -metrics["eval_rewards/chosen"] / section.beta


def unlearns(section: TrainSection, metrics: dict[str, float]) -> bool:
    """Whether an evaluation of stage 3 is past `safety.chosen_drop_limit`."""
    limit = getattr(section, "chosen_drop_limit", None)
    if limit is None or "eval_rewards/chosen" not in metrics:
        return False
    return _chosen_drop(section, metrics) > limit


def evaluations_since_best(history: list[dict[str, float]]) -> int:
    """How many evaluations of a trainer's log have passed since the lowest `eval_loss`."""
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0


def stopped_early(section: TrainSection, history: list[dict[str, float]]) -> bool:
    """Whether the trainer had stopped before its last step when it wrote this log."""
    evaluations = [entry for entry in history if "eval_loss" in entry]
    patience = section.early_stopping_patience
    tired = bool(patience) and evaluations_since_best(history) >= patience
    return bool(evaluations) and (tired or unlearns(section, evaluations[-1]))


def _not_finite(stage: Stage, what: str) -> WorkError:
    return WorkError(
        f"{stage.name}: {what} is not finite, so the run was stopped before anything was learned "
        f"from it. The last good checkpoint is kept in {stage.work}. Lower "
        f"{stage.name}.learning_rate, or set model.compute_dtype to float32."
    )


def _keep_bad_batch(stage: Stage) -> Any:
    """What to do with a batch whose loss is not finite: keep it, and stop."""

    def keep(batch: dict[str, Any]) -> None:
        from safetensors.torch import save_file

        path = stage.work / "bad_batch.safetensors"
        save_file({name: tensor.cpu().contiguous() for name, tensor in batch.items()}, str(path))
        raise _not_finite(stage, f"the loss of the batch in {path} (ids, mask, labels)")

    return keep


def progress(stage: Stage, counts: Counts) -> Any:
    """A bar on a terminal, a line per log entry elsewhere; loss and tokens/s in both.

    The same numbers go to wandb where it is asked for.
    """
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            from tqdm import tqdm

            self.clock, self.step = time.monotonic(), state.global_step
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc=stage.name,
                unit="step",
                disable=None if distributed.is_main() else True,
                dynamic_ncols=True,
            )
            self.trackers = tracking.start(
                stage.section.report_to if distributed.is_main() else [],
                f"{stage.config.model_type}-{stage.name}",
                flatten(stage.config.model_dump()),
                state.global_step,
            )

        def on_step_end(self, args, state, control, **kwargs):
            self.bar.update(state.global_step - self.bar.n)

        def on_log(self, args, state, control, logs=None, **kwargs):
            logs = logs or {}
            if "train_runtime" in logs:
                return
            speeds: dict[str, float] = {}
            if "loss" in logs:
                now = time.monotonic()
                span, seconds = slice(self.step, state.global_step), now - self.clock
                speeds = {
                    "tokens_per_second": counts.tokens[span].sum() / seconds,
                    "supervised_per_second": counts.supervised[span].sum() / seconds,
                }
            names = {
                "loss": "train_loss",
                "eval_loss": "eval_loss",
                "learning_rate": "learning_rate",
                "rewards/margins": "margin",
                "rewards/accuracies": "accuracy",
            }
            shown = {name: float(logs[key]) for key, name in names.items() if key in logs}
            shown["gpu_memory"] = _gpu_memory_gb()
            shown |= speeds
            # An evaluation's time is not the steps'.
            self.clock, self.step = time.monotonic(), state.global_step
            for tracker in self.trackers:
                tracker.log(shown, state.global_step)
            text = "  ".join(f"{key} {value:.4g}" for key, value in shown.items() if value)
            if self.bar.disable:
                print(f"  {stage.name} {state.global_step}/{state.max_steps}  {text}")
            else:
                self.bar.set_postfix_str(text)

        def on_train_end(self, args, state, control, **kwargs):
            self.bar.close()
            for tracker in self.trackers:
                tracker.finish()

    return Progress()


def _gpu_memory_gb() -> float:
    import torch

    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0


def last_checkpoint(work: Path) -> Path | None:
    """The newest complete trainer checkpoint: trainer_state.json is what is written last."""
    found = []
    for path in (work / "trainer").glob("checkpoint-*"):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            shutil.rmtree(path, ignore_errors=True)
            continue
        if all((path / name).is_file() for name in ADAPTER_FILES):
            found.append((int(path.name.rsplit("-", 1)[1]), path))
    return max(found)[1] if found else None


def run(
    stage: Stage, make_trainer: Callable[[Stage], tuple[Any, Counts]]
) -> tuple[Any, dict[str, Any]]:
    """(trainer, metrics) of a finished run, with smaller micro-batches if memory runs out.

    `make_trainer` builds a trainer for a stage and says what each of its steps computes. After an
    out-of-memory error it is asked for one with half the micro-batch and twice the accumulation,
    which goes on from the last checkpoint: the optimizer steps stay the same.
    """

    def attempt(batch_size: int, accumulation: int) -> tuple[Any, dict[str, Any]]:
        shape = {"batch_size": batch_size, "gradient_accumulation": accumulation}
        section = stage.section.model_copy(update=shape)
        config = stage.config.model_copy(update={stage.name: section})
        smaller = replace(stage, config=config)
        trainer, counts = make_trainer(smaller)
        return trainer, train(smaller, trainer, counts)

    section = stage.section
    (trainer, metrics), ladder = memory.train_within_memory(
        attempt,
        section.batch_size,
        section.gradient_accumulation,
        explain=lambda: memory.explain(stage.config, stage.name, stage.architecture),
    )
    return trainer, {**metrics, "out_of_memory": ladder}


def train(stage: Stage, trainer: Any, counts: Counts) -> dict[str, Any]:
    """Run the trainer, from its last checkpoint if there is one; returns the stage's metrics."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(progress(stage, counts))
    model = trainer.accelerator.unwrap_model(trainer.model)
    if distributed.uses_fsdp():
        distributed.keep_adapters_under_fsdp()
    restore_precision(model, stage)
    if stage.name == "safety":
        check_reference(model, stage)
    score_targets_only(trainer)
    if not distributed.uses_fsdp():  # which gathers a layer's parameters for its own operations
        from liteguard.lora_linear import fuse_lora

        fuse_lora(model)
    base = model.get_base_model()
    if stage.section.packing:
        if stage.config.model.attention == "sdpa":
            packing.use_segment_attention(base)
        packing.pack_forward(base)
        packing.check_isolation(model, stage.architecture.vocab_size)
    if stage.name == "safety" and stage.section.precompute_reference:
        precompute_reference(stage, trainer)
    hook_losses(stage, trainer, counts)
    packing.watch_losses(base, _keep_bad_batch(stage))
    if getattr(stage.section, "loss_reduction", "token") != "token":
        packing.weigh_rows(base)
    resume = distributed.on_main(last_checkpoint, stage.work)
    if resume:
        print(f"resuming from {resume.name}")
    started, cpu_started = time.monotonic(), time.process_time()
    first = int(resume.name.rsplit("-", 1)[1]) if resume else 0
    if resume:
        state = json.loads((resume / "trainer_state.json").read_text(encoding="utf-8"))
        if stopped_early(stage.section, state["log_history"]):
            trainer.args.max_steps = first  # killed between its end and publishing
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    seconds, last = time.monotonic() - started, trainer.state.global_step
    cpu_seconds = time.process_time() - cpu_started
    history = trainer.state.log_history
    evaluated = [entry for entry in history if "eval_loss" in entry]
    best = trainer.state.best_model_checkpoint
    if not best and evaluated and unlearns(stage.section, evaluated[-1]):
        raise WorkError(
            f"{stage.name}: no evaluated checkpoint is within safety.chosen_drop_limit, so nothing "
            f"was published. Lower safety.learning_rate (now {stage.section.learning_rate:g}) or "
            "raise safety.sft_weight, and pass --overwrite."
        )
    losses = [entry["loss"] for entry in history if "loss" in entry]
    seen, supervised, padding = (
        int(found[:last].sum()) for found in (counts.tokens, counts.supervised, counts.padding)
    )
    own = slice(first, last)  # steps of this process; earlier ones were another one's time
    metrics = {
        "steps": last,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "best_eval_loss": trainer.state.best_metric if best else None,
        "train_runtime_s": round(seconds, 1),
        "train_cpu_s": round(cpu_seconds, 1),
        "tokens": seen,
        "supervised_tokens": supervised,
        "padding_share": round(padding / (padding + seen), 4),
        "tokens_per_s": round(counts.tokens[own].sum() / seconds, 1),
        "supervised_tokens_per_s": round(counts.supervised[own].sum() / seconds, 1),
        "gpu_hours": round(seconds / 3600 * trainer.args.world_size * (trainer.args.n_gpu > 0), 4),
        "resumed_from": resume.name if resume else None,
    }
    print(
        f"{stage.name}: {last} steps, {seen:,} tokens ({supervised:,} supervised, padding "
        f"{metrics['padding_share']:.1%}), {metrics['tokens_per_s']:,.0f} tokens/s "
        f"({metrics['supervised_tokens_per_s']:,.0f} supervised), peak memory "
        f"{machine.peak_rss_gb():.1f} GB, GPU {_gpu_memory_gb():.1f} GB; {seconds:,.0f} s, "
        f"{metrics['gpu_hours']:.2f} GPU hours"
    )
    return metrics


def hook_losses(stage: Stage, trainer: Any, counts: Counts) -> None:
    """Feed a trainer whole optimizer steps that all learn, and let its losses be means over them
    and over the whole validation set."""
    validation.warm_up_from_first_step(trainer)
    if stage.name != "safety":
        validation.score_whole_set(trainer, validation.answer_scores)
        return
    # The trainer itself would go round the pairs in one order, with a small step at each end.
    pairs = trainer.train_dataset
    trainer.train_dataset = pairs.select(pair_order(stage.section, len(pairs)))
    weight = stage.section.sft_weight
    validation.score_whole_set(trainer, validation.pair_scores, weight)
    if weight:
        validation.weigh_sft_by_step(trainer, weight, counts.chosen)


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


def finish(stage: Stage, trainer: Any, tokenizer: Any, metrics: dict[str, Any]) -> None:
    """Save adapter, tokenizer, curves and stage.json, and give the directory its final name."""
    work = stage.work
    probe = validation.probe_rows(trainer)
    with trainer.compute_loss_context_manager():
        trained = validation.mean_loss(trainer.model, probe)
    # A sharded model is gathered by all processes; one of them writes.
    state = trainer.accelerator.get_state_dict(trainer.model) if distributed.uses_fsdp() else None
    if not distributed.is_main():
        distributed.barrier()
        return
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
    record = {
        "stage": stage.name,
        "base_model": config.model.name,
        "base_revision": stage.base_revision,
        "base_identity": stage.inputs["base"],
        "parent": str(stage.parent) if stage.parent else None,
        "parent_adapter_sha256": stage.inputs["parent"],
        "data_dir": str(stage.data_dir),
        "rows": stage.rows,
        "prompt": config.prompt.model_dump(),
        "config": config.model_dump(),
        "config_sources": config.sources,
        "metrics": metrics,
        "processes": distributed.world_size(),
        "versions": library_versions(),
        "wall_s": round(time.time() - stage.started, 1),
        "peak_rss_gb": machine.peak_rss_gb(),
        "peak_gpu_memory_gb": _gpu_memory_gb(),
    }
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
    checkpoints.publish(work, stage.output, record, files)
    distributed.barrier()


def both_bases(stage: Stage, probe: validation.Rows, trained: float) -> dict[str, Any]:
    """The saved adapter's validation loss on the base it was trained on and on the one that ships.

    Stages train against an NF4 copy of the base, which for a small model is another model; the
    adapter is merged into the 16-bit one.
    """
    parameters = models.count_parameters(stage.architecture)
    shipped = validation.shipped_loss(stage.config, stage.work, parameters, probe)
    found = {
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
        f"{found['trained_perplexity']:.2f} on the base as trained on ({stage.storage})"
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


def library_versions() -> dict[str, str]:
    """Versions of the libraries whose behaviour the results depend on."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate", "datasets"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def describe(
    stage: Stage, sample: str, what: str, rows: int, passes: float, tokens: int, dry_run: bool
) -> None:
    """Print what a run is going to do and the memory it may take, by term in a dry run.

    tokens: of the largest micro-batch. Raises UserError where the machine has too little memory.
    """
    print(
        f"{stage.name}: {stage.section.max_steps} steps of {what} = {passes:.2f} passes over "
        f"{rows:,} rows; output {stage.output}"
    )
    print(f"first sequence:\n{sample[:600]}\n")
    try:
        expected = memory.estimate(stage.config, stage.name, stage.architecture, tokens)
    except UserError as error:  # an architecture without a formula
        print(error)
        return
    if dry_run:
        print(f"{expected.table()}\n")
    host = memory.host_memory(expected, models.count_parameters(stage.architecture))
    if expected.cuda:
        print(f"expected peak GPU memory: {(expected.total + expected.margin) / 1e9:.1f} GB")
    print(f"expected peak memory: {host}")
    advice = memory.advice(stage.config, stage.name)
    machine.require_memory(host.needed, f"stage {stage.name}", f"; or set {advice}.")


def describe_feed(
    stage: Stage,
    tokenizer: Any,
    train: tokens.TokenRows,
    held_out: tokens.TokenRows,
    dry_run: bool,
) -> None:
    """`describe` for stages 1 and 2."""
    section, found = stage.section, feed(stage, tokenizer, train, held_out)
    counts = found.counts
    rows = stage.rows["train"]
    trained = sum(map(len, found.train["rows"]))
    sizes = f"{counts.tokens.mean():,.0f} tokens ({counts.supervised.mean():,.0f} supervised)"
    shape = f"in {len(found.train) // section.max_steps} micro-batches"
    shape += " without padding" if section.packing else f", {counts.padding.mean():,.0f} padding"
    ids = train.row(found.train[0]["rows"][0])[0]
    passes = trained / len(train) if stage.name == "domain" else trained / rows
    sizes_of = (train.lengths[batch] for batch in found.train["rows"])
    largest = max(int(n.sum() if section.packing else len(n) * n.max()) for n in sizes_of)
    sample = tokenizer.decode(ids)
    describe(stage, sample, f"{sizes} {shape}", rows, passes, largest, dry_run)


def longest_pairs(tokenizer: Any, pairs: list[dict[str, str]], batch_size: int) -> int:
    """Tokens of a micro-batch of the longest pairs; the longest by characters are counted."""
    longest = sorted(pairs, key=lambda pair: -sum(map(len, pair.values())))[: 4 * batch_size]
    counts = [
        sum(len(models.encode(tokenizer, pair["prompt"] + pair[a])) for a in ("chosen", "rejected"))
        for pair in longest
    ]
    return sum(sorted(counts)[-batch_size:])
