"""What the three training stages share: inputs, trainer arguments, progress, resume, saving."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import re
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liteguard import checkpoints, datasets, distributed, models
from liteguard.config import Config, TrainSection, flatten
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
    architecture: str
    embedding_rows: int
    inputs: dict[str, Any]
    work: Path | None = None
    started: float = field(default_factory=time.time)

    @property
    def section(self) -> TrainSection:
        return getattr(self.config, self.name)

    @property
    def storage(self) -> str:
        """How the frozen base is stored in this stage: 'nf4' or 'none' (16 or 32 bit)."""
        return self.section.quantization or self.config.model.quantization


@distributed.main_first
def plan(
    name: str, config: Config, output: Path, data_dir: Path, parent: Path | None = None
) -> Stage:
    """Check everything a stage needs: data, base model, parent; nothing heavy is loaded.

    Raises UserError when the parent was trained on another base model or with another prompt.
    """
    missing = [
        tool for tool in getattr(config, name).report_to if importlib.util.find_spec(tool) is None
    ]
    if missing:
        raise UserError(
            f"{name}.report_to names {', '.join(missing)}, which is not installed. "
            f"Run: pip install {' '.join(missing)}"
        )
    distributed.accumulation(getattr(config, name).gradient_accumulation, name)
    directory, revision, loaded = models.model_config(config)
    manifest = datasets.read_manifest(data_dir)
    identity = models.base_identity(directory, loaded)
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
        **{
            f"data/{s}": manifest["files"].get(f"{part}/{s}.jsonl") for s in ("train", "validation")
        },
        **{f"{name}.{key}": value for key, value in section.items()},
        **{f"prompt.{key}": value for key, value in config.prompt.model_dump().items()},
    }
    return Stage(
        name=name,
        config=config,
        output=output,
        data_dir=data_dir,
        parent=parent,
        base_directory=directory,
        base_revision=revision,
        architecture=loaded.model_type,
        embedding_rows=loaded.vocab_size,
        inputs=inputs,
    )


def load_tokenizer(stage: Stage) -> Any:
    """The parent's tokenizer, or the base model's in the first stage."""
    return models.load_tokenizer(
        str(stage.parent or stage.base_directory), stage.config.prompt, stage.embedding_rows
    )


def load_model(stage: Stage) -> Any:
    """The base in NF4 with the parent's adapter, or with a fresh one; only the adapter trains."""
    dtype, reason = models.choose_dtype(stage.config.model.compute_dtype, stage.architecture)
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


@distributed.main_first
def token_stream(tokenizer: Any, data_dir: Path, split: str, config: Config) -> np.ndarray:
    """All domain texts of a split as one stream of ids, uint32, each ended by the document end.

    Kept in the cache as an .npy file, named by the texts' sha256, the tokenizer and the end token,
    and mapped into memory from there: a large corpus is tokenized once, however often training
    starts.
    """
    import numpy as np
    from tqdm import tqdm

    end = config.prompt.document_end_token
    key = checkpoints.sha256_json(
        {
            "texts": datasets.read_manifest(data_dir)["files"].get(f"domain/{split}.jsonl"),
            "tokenizer": tokenizer.backend_tokenizer.to_str(),
            "end": end,
        }
    )
    path = Path(config.data.cache_dir) / "tokens" / f"{key[:32]}.npy"
    rows = None if path.exists() else datasets.load_split(data_dir, "domain", split)
    if rows is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        batches = []
        with tqdm(total=len(rows), desc="tokenizing", unit=" texts", disable=None) as bar:
            for start in range(0, len(rows), 1_000):
                texts = [row["text"] + end for row in rows[start : start + 1_000]]
                ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
                batches.append(np.fromiter(itertools.chain.from_iterable(ids), np.uint32))
                bar.update(len(texts))
        staging = path.with_name(f".{path.stem}.partial.npy")
        np.save(staging, np.concatenate(batches))
        os.replace(staging, path)
    return np.load(path, mmap_mode="r", allow_pickle=False)


def document_blocks(stream: np.ndarray, config: Config) -> np.ndarray:
    """A stream of ids cut into blocks, shape (blocks, domain.max_length).

    The incomplete last block is dropped. Raises UserError when there is no whole block.
    """
    length = min(config.domain.max_length, config.model.context_length)
    count = len(stream) // length
    if not count:
        raise UserError(
            f"The domain texts have {len(stream)} tokens, fewer than one block of "
            f"domain.max_length = {length}. Use more text or a smaller domain.max_length."
        )
    return stream[: count * length].reshape(count, length)


def packed_dataset(blocks: np.ndarray) -> Any:
    """Blocks as a datasets.Dataset; labels equal the ids: every token is a target."""
    import numpy as np
    from datasets import Dataset

    ids = np.asarray(blocks, np.int64)
    return Dataset.from_dict({"input_ids": ids, "labels": ids})


def tokenize_pair(
    tokenizer: Any,
    config: Config,
    question: str,
    answer: str,
    max_length: int,
    opening_tokens: int | None = None,
) -> dict[str, list[int]] | None:
    """Ids and labels of one question and answer; None when the answer alone is too long.

    Labels are -100 on the prompt; the answer and its end token are supervised. A pair that is too
    long loses the beginning of its question, never the end of its answer. With `opening_tokens`
    the sequence stops after so many tokens of the answer, and nothing claims that it ends there.
    """
    prompt = config.prompt
    before = models.encode(tokenizer, prompt.render_question(question))
    after = models.encode(tokenizer, prompt.render_answer(answer))[:opening_tokens]
    room = max_length - len(after)
    if room < 1:
        return None
    before = before[-room:]
    return {"input_ids": before + after, "labels": [-100] * len(before) + after}


def tokenize_answers(tokenizer: Any, rows: list[dict], config: Config, part: str) -> list[dict]:
    """Prompt/completion rows with completion-only labels; more than 1 % unusable is an error."""
    length = min(config.instruction.max_length, config.model.context_length)
    pairs = (
        tokenize_pair(
            tokenizer, config, r["prompt"], r["completion"], length, r.get("opening_tokens")
        )
        for r in rows
    )
    kept = [pair for pair in pairs if pair is not None]
    lost = len(rows) - len(kept)
    if lost > 0.01 * len(rows):
        raise UserError(
            f"{lost} of {len(rows)} {part} rows have an answer longer than instruction.max_length "
            f"= {length} tokens. Raise it or shorten the answers."
        )
    if lost:
        print(f"{part}: {lost} of {len(rows)} rows dropped (answer longer than {length} tokens)")
    return kept


def order_by_length(sequences: list[dict], section: TrainSection) -> list[dict]:
    """Sequences with those of one optimizer step sorted by length, the steps left as they are.

    Micro-batches then hold sequences of similar length, which saves padding, while every step still
    sees a random mixture (grouping across steps would feed it one kind of answer at a time).
    """
    step = section.batch_size * section.gradient_accumulation
    ordered: list[dict] = []
    for start in range(0, len(sequences), step):
        ordered += sorted(sequences[start : start + step], key=lambda s: len(s["input_ids"]))
    return ordered


def render_preferences(
    tokenizer: Any, rows: list[dict], config: Config, part: str, limit: int
) -> list[dict[str, str]]:
    """Preference rows as rendered text (prompt, chosen, rejected), their kinds taking turns.

    `safety.kind_weights` sets their shares, and with them where stage 3 leaves the line between
    helping and refusing.

    Pairs longer than `safety.max_length` are left out, because the trainer would cut the end of
    their answers; more than 1 % of them is an error.
    """
    length = min(config.safety.max_length, config.model.context_length)
    prompt = config.prompt
    kept, lost = [], 0
    for row in balanced(rows, "kind", limit, config.safety.kind_weights):
        rendered = {
            "prompt": prompt.render_question(row["prompt"]),
            "chosen": prompt.render_answer(row["chosen"]),
            "rejected": prompt.render_answer(row["rejected"]),
        }
        ids = {key: len(models.encode(tokenizer, text)) for key, text in rendered.items()}
        if ids["prompt"] + max(ids["chosen"], ids["rejected"]) > length:
            lost += 1
        else:
            kept.append(rendered)
    if lost > 0.01 * (lost + len(kept)):
        raise UserError(
            f"{lost} of {lost + len(kept)} {part} preference pairs are longer than "
            f"safety.max_length = {length} tokens. Raise it or shorten the answers."
        )
    return kept


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
    import torch
    from trl.trainer.utils import FusedCausalLMOutput

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
        logits = model.get_output_embeddings()(hidden[mask]).float()
        log_softmax = logits.log_softmax(-1)
        targets = labels[:, 1:][mask]
        log_probs = log_softmax.gather(-1, targets[:, None])[:, 0]
        with torch.no_grad():
            entropy = -(log_softmax.exp() * log_softmax).sum(-1)
            is_top1 = log_softmax.argmax(-1) == targets
            mean_logits = logits.mean(-1)

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
    dtype, _ = models.choose_dtype(stage.config.model.compute_dtype, stage.architecture)
    # load_best_model_at_end wants every evaluation to have a checkpoint.
    save_steps = max(section.save_steps // section.eval_steps, 1) * section.eval_steps
    evaluates = section.eval_steps <= section.max_steps
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
        "load_best_model_at_end": evaluates and save_steps <= section.max_steps,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
        "report_to": [name for name in section.report_to if name != "wandb"],
        "seed": section.seed,
        "data_seed": section.seed,
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "remove_unused_columns": False,
        "max_length": min(section.max_length, stage.config.model.context_length),
        "pad_token": stage.config.prompt.pad_token,
    }


def callbacks(stage: Stage) -> list[Any]:
    """Progress, logging to wandb, the stop on a loss that is not finite, early stopping."""
    from transformers import EarlyStoppingCallback, TrainerCallback

    section = stage.section
    arguments = trainer_arguments(stage)

    class Progress(TrainerCallback):
        """A bar on a terminal, a line per log entry elsewhere; loss and tokens/s in both."""

        def on_train_begin(self, args, state, control, **kwargs):
            from tqdm import tqdm

            self.clock, self.tokens = time.monotonic(), None
            self.last: dict[str, float] = {}
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc=stage.name,
                unit="step",
                disable=None if distributed.is_main() else True,
                dynamic_ncols=True,
            )
            wanted = "wandb" in section.report_to and distributed.is_main()
            self.wandb = _start_wandb(stage) if wanted else None

        def on_step_end(self, args, state, control, **kwargs):
            self.bar.update(state.global_step - self.bar.n)
            if arguments["load_best_model_at_end"] and state.global_step == state.max_steps:
                # The best checkpoint is chosen among those that were evaluated and saved.
                control.should_evaluate = control.should_save = True

        def on_log(self, args, state, control, logs=None, **kwargs):
            logs = logs or {}
            if "train_runtime" in logs:
                return
            for key in ("loss", "eval_loss"):
                if key in logs and not math.isfinite(logs[key]):
                    raise WorkError(
                        f"{stage.name}: {key} became {logs[key]} at step {state.global_step}. "
                        f"The last good checkpoint is kept in {stage.work}. Lower "
                        f"{stage.name}.learning_rate, or set model.compute_dtype to float32."
                    )
            shown = {}
            if "num_tokens" in logs:
                now, tokens = time.monotonic(), logs["num_tokens"]
                if self.tokens is not None and now > self.clock:
                    self.last["tokens_per_second"] = (tokens - self.tokens) / (now - self.clock)
                self.clock, self.tokens = now, tokens
            names = {
                "loss": "train_loss",
                "eval_loss": "eval_loss",
                "learning_rate": "learning_rate",
            }
            names |= {"rewards/margins": "margin", "rewards/accuracies": "accuracy"}
            for key, name in names.items():
                if key in logs:
                    shown[name] = float(logs[key])
            shown["gpu_memory"] = _gpu_memory_gb()
            shown |= self.last
            if self.wandb:
                self.wandb.log(shown, step=state.global_step)
            text = "  ".join(f"{key} {value:.4g}" for key, value in shown.items() if value)
            if self.bar.disable:
                print(f"  {stage.name} {state.global_step}/{state.max_steps}  {text}")
            else:
                self.bar.set_postfix_str(text)

        def on_train_end(self, args, state, control, **kwargs):
            self.bar.close()
            if self.wandb:
                self.wandb.finish()

    result: list[Any] = [Progress()]
    if section.early_stopping_patience and arguments["load_best_model_at_end"]:
        result.append(EarlyStoppingCallback(section.early_stopping_patience))
    return result


def _start_wandb(stage: Stage) -> Any:
    import wandb

    return wandb.init(
        project="liteguard",
        name=f"{stage.config.model_type}-{stage.name}",
        config=flatten(stage.config.model_dump()),
    )


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


def train(stage: Stage, trainer: Any) -> dict[str, Any]:
    """Run the trainer, from its last checkpoint if there is one; returns the stage's metrics."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    model = trainer.accelerator.unwrap_model(trainer.model)
    restore_precision(model, stage)
    if stage.name == "safety":
        check_reference(model, stage)
    score_targets_only(trainer)
    resume = distributed.on_main(last_checkpoint, stage.work)
    if resume:
        print(f"resuming from {resume.name}")
    result = trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    evaluations = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    return {
        "steps": trainer.state.global_step,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "best_eval_loss": min(evaluations, default=None),
        "train_runtime_s": result.metrics.get("train_runtime"),
        "tokens": next((e["num_tokens"] for e in reversed(history) if "num_tokens" in e), None),
        "resumed_from": resume.name if resume else None,
    }


def finish(
    stage: Stage, trainer: Any, tokenizer: Any, metrics: dict[str, Any], rows: dict[str, int]
) -> None:
    """Save adapter, tokenizer, curves and stage.json, and give the directory its final name."""
    work = stage.work
    # A sharded model is gathered by all processes; one of them writes.
    state = trainer.accelerator.get_state_dict(trainer.model) if distributed.uses_fsdp() else None
    if not distributed.is_main():
        distributed.barrier()
        return
    # DPO adds a frozen copy named "ref"; only the trained adapter is a result.
    trainer.accelerator.unwrap_model(trainer.model).save_pretrained(
        str(work), state_dict=state, selected_adapters=["default"], safe_serialization=True
    )
    # save_pretrained makes a README.md from the hub's template, which says nothing true here.
    (work / "README.md").unlink(missing_ok=True)
    tokenizer.save_pretrained(str(work))
    checkpoints.write_json(work / "log_history.json", trainer.state.log_history)
    plot_curves(trainer.state.log_history, work / "curves.png", stage.name)
    config = stage.config
    record = {
        "stage": stage.name,
        "base_model": config.model.name,
        "base_revision": stage.base_revision,
        "base_identity": stage.inputs["base"],
        "parent": str(stage.parent) if stage.parent else None,
        "parent_adapter_sha256": stage.inputs["parent"],
        "data_dir": str(stage.data_dir),
        "rows": rows,
        "prompt": config.prompt.model_dump(),
        "config": config.model_dump(),
        "config_sources": config.sources,
        "metrics": metrics,
        "processes": distributed.world_size(),
        "versions": library_versions(),
        "wall_s": round(time.time() - stage.started, 1),
        "peak_rss_gb": peak_rss_gb(),
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


def peak_rss_gb() -> float:
    """Peak resident memory of this process in GB (10^9 bytes)."""
    import resource

    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3)


def check_disk(directory: Path, needed_gb: float) -> None:
    """Raise WorkError when the file system of `directory` has less than `needed_gb` free."""
    existing = directory.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free / 1e9
    if free < needed_gb:
        raise WorkError(
            f"{existing} has {free:.1f} GB free; about {needed_gb:.1f} GB are needed. "
            "Free some space or choose another --output, then run the same command again."
        )


def describe(stage: Stage, train_rows: int, sample: str) -> None:
    """Print what a run is going to do (all of a dry run's output but the model's part)."""
    section = stage.section
    wanted = needed_rows(section)
    print(
        f"{stage.name}: {section.max_steps} steps of {section.batch_size} x "
        f"{section.gradient_accumulation} sequences = {wanted / train_rows:.2f} passes over "
        f"{train_rows:,}; output {stage.output}"
    )
    print(f"first sequence:\n{sample[:600]}\n")
