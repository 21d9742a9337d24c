"""From the YAML's section to the trainer's arguments."""

from __future__ import annotations

from typing import Any

from liteguard import distributed, models
from liteguard.config import SafetySection, TrainSection
from liteguard.training.stage import Run


def warmup_steps(section: TrainSection) -> int:
    """Steps over which the learning rate rises: at least one is left at its full height."""
    if section.lr_scheduler == "constant":  # which has no warm-up
        return 0
    return min(section.warmup_steps, max(section.max_steps - 1, 0))


def trainer_arguments(stage: Run) -> dict[str, Any]:
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
        "warmup_steps": warmup_steps(section),
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


def preference_losses(section: SafetySection) -> dict[str, Any]:
    """DPOConfig's arguments for the loss of a pair, and the likelihood term beside it."""
    weight = section.sft_weight
    return {
        "beta": section.beta,
        "loss_type": [section.preference_loss, *(["sft"] if weight else [])],
        "loss_weights": [1.0, weight] if weight else None,
    }
