"""What is changed about a trainer and its model before training, and in which order."""

from __future__ import annotations

from typing import Any

from liteguard import distributed
from liteguard.training import isolation, packing, teacher, validation
from liteguard.training.callbacks import keep_bad_batch
from liteguard.training.feed import Counts, pair_order
from liteguard.training.reference import check_reference, precompute_reference, restore_precision
from liteguard.training.stage import Run, Stage


def prepare(stage: Run, trainer: Any, counts: Counts) -> None:
    """Make the trainer compute what this project means by a step.

    The order matters where one patch looks at what another leaves:

    1. `keep_adapters_under_fsdp`, `restore_precision`: the adapter's own values, before anything
       compares or copies them.
    2. `check_reference`: policy and reference against the parent's file, untouched by a forward.
    3. `score_targets_only`: replaces the `forward` of the causal model; what follows wraps it.
    4. `fuse_lora`: replaces linear layers, which no `forward` below holds a reference to.
    5. `isolation.pack`: rows alone, then attention of packed rows and `pack_forward`, then the
       proof that both are the same and no row sees another: with the layers that will train.
    6. `precompute_reference`, `teacher.prepare`: forward passes as in training, so after 3 to 5.
       The first needs the parent's weights, which a resumed run replaces only later.
    7. `hook_losses`: the trainer's own losses and sets, which 6 has given a column more.
    8. `watch_losses`, `weigh_rows`: outermost around `forward`. The watch comes first and so sees
       log-probabilities before they are weighted: a weight of 0 must not hide a bad batch.
    9. `add_noise`: needs the padded batch, and must not be there when 5 compares.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    if distributed.uses_fsdp():
        distributed.keep_adapters_under_fsdp()
        distributed.keep_precision_under_fsdp(trainer.accelerator.state.fsdp_plugin)
    restore_precision(model, stage)
    if stage.name == "safety":
        check_reference(model, stage)
    distills = teacher.taught_rows(trainer) if stage.name == "instruction" else []
    score_targets_only(trainer, bool(distills))
    if not distributed.uses_fsdp():  # which gathers a layer's parameters for its own operations
        from liteguard.training.lora_linear import fuse_lora

        fuse_lora(model)
    base = model.get_base_model()
    if stage.section.packing:
        longest = min(stage.section.max_length, stage.config.model.context_length)
        isolation.pack(model, stage.architecture, longest)
    if stage.name == "safety" and stage.config.safety.precompute_reference:
        precompute_reference(stage, trainer)
    if distills:
        teacher.prepare(stage, trainer, distills)
    hook_losses(stage, trainer, counts)
    packing.watch_losses(base, keep_bad_batch(stage))
    if getattr(stage.section, "loss_reduction", "token") != "token":
        packing.weigh_rows(base)
    if noise := getattr(stage.section, "neftune_noise_alpha", None):
        packing.add_noise(base, noise)


def score_targets_only(trainer: Any, distills: bool = False) -> bool:
    """On a CPU, compute logits at supervised positions only; returns whether that was set up.

    TRL 1.16 does so on devices with Triton. Elsewhere it runs every position, prompts and padding
    included, through the vocabulary in its own tiles, which took about half of a stage-2 step on
    two cores. Same loss and gradients: tests/test_training.py compares them. Targets that are
    distributions are known here only, so a run that `distills` uses it on every device.
    """
    from trl.trainer.utils import FusedCausalLMOutput

    from liteguard.training.loss_head import TargetScores, expected_rows, is_special

    model = trainer.accelerator.unwrap_model(trainer.model).get_base_model()
    if is_special(model.config) or (model.device.type != "cpu" and not distills):
        return False
    original = model.forward

    def forward(
        *args: Any,
        fused_lm_head: bool = False,
        labels: Any = None,
        num_items_in_batch: Any = None,
        soft: Any = None,
        expected: Any = None,
        teaching: bool = False,
        **kwargs: Any,
    ) -> Any:
        if not fused_lm_head:
            return original(*args, labels=labels, **kwargs)
        kwargs["use_cache"] = False
        hidden = model.base_model(*args, **kwargs).last_hidden_state[:, :-1]
        mask = labels[:, 1:] != -100
        head = model.get_output_embeddings()
        if teaching:  # what is expected, and no scores
            found = FusedCausalLMOutput(label_mask=mask)
            found.expected = expected_rows(hidden[mask], head.weight, head.bias)
            return found
        log_probs, entropy, mean_logits, is_top1 = TargetScores.apply(
            hidden[mask],
            head.weight,
            head.bias,
            labels[:, 1:][mask],
            None if soft is None else soft[:, 1:][mask],
            expected,
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
    weight = stage.config.safety.sft_weight
    validation.score_whole_set(trainer, validation.pair_scores, weight)
    if weight and counts.chosen is not None:
        validation.weigh_sft_by_step(trainer, weight, counts.chosen)
