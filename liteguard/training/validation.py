"""Numbers that choose a checkpoint or stop a run: means over all tokens, or pairs, of a set.

A trainer's own `eval_loss` is a mean of its batches' means, in which a token counts more the fewer
there are in its batch: another batch size gives another number, and sometimes another checkpoint.
Here every row gives sums and counts, and a mean is taken once, over the rows of all batches and
processes. The likelihood term of stage 3's loss is treated alike, by optimizer step.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from liteguard import machine, merged
from liteguard.config import Config
from liteguard.errors import WorkError

if TYPE_CHECKING:
    import numpy as np
    import torch

# Validation rows that are scored on both bases, and their tokens on a CPU, where Phi-2 takes one
# and a half minutes for so many (11 TFLOP at 120 GFLOP/s). Both bases get the same rows, so few
# will do.
PROBE_ROWS = 32
PROBE_TOKENS = 2048
# Name of a number -> (its sums, its counts) by row, shape (rows,) each.
Scores = dict[str, tuple["torch.Tensor", "torch.Tensor"]]


def answer_scores(trainer: Any, model: Any, batch: dict[str, torch.Tensor]) -> Scores:
    """Scores of a batch of stages 1 and 2 (`packing.Collator`), by supervised token."""
    outputs = model(**batch, use_cache=False, fused_lm_head=True)
    tokens = outputs.label_mask.sum(1)
    return {
        "loss": (-outputs.log_probs.sum(1), tokens),
        "entropy": (outputs.entropy.sum(1), tokens),
        "mean_token_accuracy": (outputs.is_top1.sum(1), tokens),
    }


def pair_scores(trainer: Any, model: Any, batch: dict[str, torch.Tensor]) -> Scores:
    """Scores of a batch of stage 3 (TRL's collator: chosen answers, then rejected ones), by pair.

    A reward is beta times the distance from the reference in log-probability, the loss of a pair
    the trainer's own (`pair_losses`). `sft_loss` is the mean over the tokens of chosen answers.
    """
    import torch

    mask = batch["completion_mask"]
    outputs = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        labels=batch["input_ids"].masked_fill(mask == 0, -100),
        use_cache=False,
        fused_lm_head=True,
    )
    policy = outputs.log_probs.double().sum(1).chunk(2)
    if trainer.precompute_ref_logps:
        reference = batch["ref_chosen_logps"], batch["ref_rejected_logps"]
    else:
        reference = trainer.compute_ref_log_probs(model, batch)
    gained = [ours - theirs for ours, theirs in zip(policy, reference, strict=True)]
    lengths = [part.sum(1) for part in mask.chunk(2)]
    losses = pair_losses(trainer.loss_types[0], trainer.beta, *gained, *lengths)
    chosen, rejected = (trainer.beta * nats for nats in gained)
    one = torch.ones_like(chosen)
    return {
        "pair_loss": (losses, one),
        "sft_loss": (-policy[0], mask.chunk(2)[0][:, 1:].sum(1)),
        "rewards/chosen": (chosen, one),
        "rewards/rejected": (rejected, one),
        "rewards/margins": (chosen - rejected, one),
        "rewards/accuracies": (chosen > rejected, one),
    }


def pair_losses(
    kind: str,
    beta: float,
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    chosen_tokens: torch.Tensor,
    rejected_tokens: torch.Tensor,
) -> torch.Tensor:
    """Losses of pairs, shape (pairs,), by their name in TRL's DPOTrainer.

    chosen, rejected: nats by which an answer is likelier than to the reference, shape (pairs,).
    sigmoid is DPO (Rafailov et al. 2023, arXiv:2305.18290, eq. 7), sigmoid_norm DPO by token, hinge
    SLiC's (Zhao et al. 2023, arXiv:2305.10425), ipo that of Azar et al. 2023 (arXiv:2310.12036,
    eq. 17) by token, apo_* D'Oosterlinck et al. 2024 (arXiv:2408.06266, eq. 7 and 8), nca_pair Chen
    et al. 2024 (arXiv:2402.05369), bco_pair Jung et al. 2024 (arXiv:2404.04656) without its shift,
    sppo_hard Wu et al. 2024 (arXiv:2405.00675, eq. 4.7).
    """
    from torch.nn.functional import logsigmoid

    a, b = beta * chosen, beta * rejected
    if kind in ("ipo", "sigmoid_norm"):
        by_token = chosen / chosen_tokens.clamp(min=1) - rejected / rejected_tokens.clamp(min=1)
        if kind == "ipo":
            return (by_token - 1 / (2 * beta)) ** 2
        return -logsigmoid(beta * by_token)
    if kind == "sigmoid":
        return -logsigmoid(a - b)
    if kind == "hinge":
        return (1 - (a - b)).relu()
    if kind == "apo_zero":
        return 1 - a.sigmoid() + b.sigmoid()
    if kind == "apo_down":
        return a.sigmoid() + 1 - (a - b).sigmoid()
    if kind == "nca_pair":
        return -logsigmoid(a) - 0.5 * logsigmoid(-a) - 0.5 * logsigmoid(-b)
    if kind == "bco_pair":
        return -logsigmoid(a) - logsigmoid(-b)
    assert kind == "sppo_hard", kind
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


def score_whole_set(
    trainer: Any,
    row_scores: Callable[[Any, Any, dict[str, torch.Tensor]], Scores],
    sft_weight: float = 0.0,
) -> None:
    """Let a trainer evaluate by `row_scores`: `eval_NAME` is sums over counts of the whole set.

    Rows that fill up the last batch of several processes are not counted. Of pairs `eval_loss` is
    `eval_pair_loss` plus `sft_weight` times `eval_sft_loss`.
    """
    import torch

    names: list[str] = []
    gathered: list[torch.Tensor] = []
    evaluate = trainer.evaluation_loop

    def prediction_step(
        model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[None, None, None]:
        inputs = trainer._prepare_inputs(inputs)
        with torch.no_grad(), trainer.compute_loss_context_manager():
            scores = row_scores(trainer, model, inputs)
        names[:] = scores
        columns = [part.double() for score in scores.values() for part in score]
        gathered.append(trainer.accelerator.gather_for_metrics(torch.stack(columns, dim=1)))
        return None, None, None

    def evaluation_loop(*args: Any, **kwargs: Any) -> Any:
        gathered.clear()
        output = evaluate(*args, **kwargs)
        sums = torch.cat(gathered).sum(0).view(-1, 2)
        found = dict(zip(names, (sums[:, 0] / sums[:, 1].clamp(min=1)).tolist(), strict=True))
        if "pair_loss" in found:
            found["loss"] = found["pair_loss"] + sft_weight * found["sft_loss"]
        output.metrics.update({f"eval_{name}": value for name, value in found.items()})
        return output

    trainer.prediction_step, trainer.evaluation_loop = prediction_step, evaluation_loop


def weigh_sft_by_step(trainer: Any, weight: float, chosen_tokens: np.ndarray) -> None:
    """Let the likelihood term of a DPO trainer be a mean over the tokens of an optimizer step.

    TRL takes the mean of each micro-batch and averages those. With n of the step's N tokens in one
    of its M micro-batches, the weight of the term there has to be n M / N times the configured one.

    chosen_tokens: (max_steps,), tokens of chosen answers in each optimizer step of all processes.
    """
    args, compute_loss = trainer.args, trainer.compute_loss
    micro_batches = args.gradient_accumulation_steps * args.world_size

    def weighted(model: Any, inputs: dict[str, torch.Tensor], *more: Any, **kwargs: Any) -> Any:
        tokens = inputs["completion_mask"].chunk(2)[0][:, 1:].sum()
        share = tokens * micro_batches / int(chosen_tokens[trainer.state.global_step])
        trainer.loss_weights = [1.0, weight * share]
        return compute_loss(model, inputs, *more, **kwargs)

    trainer.compute_loss = weighted


def warm_up_from_first_step(trainer: Any) -> None:
    """Let step s of a warm-up of w steps run at s / w of the learning rate.

    transformers' schedules give step 1 a rate of 0, so that it learns nothing. From the end of the
    warm-up on they are as they were; `constant` has none.
    """
    from torch.optim.lr_scheduler import LambdaLR

    warmup, create = trainer.args.warmup_steps, trainer.create_scheduler
    if not warmup or trainer.args.lr_scheduler_type == "constant":
        return

    def create_scheduler(*args: Any, **kwargs: Any) -> LambdaLR:
        planned = create(*args, **kwargs).lr_lambdas[0]
        trainer.lr_scheduler = LambdaLR(
            trainer.optimizer,
            lambda step: (step + 1) / warmup if step < warmup else planned(step),
        )
        return trainer.lr_scheduler

    trainer.create_scheduler = create_scheduler


Rows = list[tuple["torch.Tensor", "torch.Tensor"]]  # (ids, labels), int64, shape (tokens,) each


def probe_rows(trainer: Any) -> Rows:
    """The first validation rows of a trainer, of a pair its chosen answer, without padding."""
    import torch

    found: Rows = []
    room = math.inf if torch.cuda.is_available() else PROBE_TOKENS
    for number in range(min(PROBE_ROWS, len(trainer.eval_dataset))):
        batch = trainer.data_collator([trainer.eval_dataset[number]])
        ids, length = batch["input_ids"][0], int(batch["attention_mask"][0].sum())
        room -= length
        if found and room < 0:
            break
        if "labels" in batch:
            labels = batch["labels"][0]
        else:
            labels = ids.masked_fill(batch["completion_mask"][0] == 0, -100)
        found.append((ids[:length], labels[:length]))
    return found


def mean_loss(model: Any, rows: Rows) -> float:
    """Nats per supervised token of rows, one row at a time, from the model's own logits."""
    import torch

    device = next(model.parameters()).device
    total, count = 0.0, 0
    model.eval()
    for ids, labels in rows:
        targets = labels[1:].to(device)
        first = int((targets != -100).nonzero()[0])
        targets = targets[first:]
        with torch.no_grad():
            logits = model(
                input_ids=ids[None].to(device),
                use_cache=False,
                logits_to_keep=len(targets) + 1,
            ).logits[0, :-1]
            # In parts: float32 logits of a long text are more than its 16-bit ones and the rest.
            for part, wanted in zip(logits.split(256), targets.split(256), strict=True):
                total += torch.nn.functional.cross_entropy(
                    part.float(), wanted, reduction="sum"
                ).item()
        count += int((targets != -100).sum())
    return total / count


def release(model: Any) -> None:
    """Give the memory of a model's weights back, whoever still refers to it."""
    import torch

    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.new_empty(0)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def shipped_loss(config: Config, adapter: Path, parameters: int, rows: Rows) -> float | None:
    """`mean_loss` of an adapter merged into the 16-bit base, or None where that does not fit.

    A number is not worth a finished stage: too little memory must not end its process.
    """
    import torch

    needed, free = 2.5 * parameters + 1e9, machine.available_memory()
    # On a GPU, too: the merged model is made in the host's memory.
    if free is not None and free < needed:
        print(f"not scored on the 16-bit base: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} free")
        return None
    try:
        model, _ = merged.load_merged(config, adapter)
        return mean_loss(model, rows)
    except (torch.OutOfMemoryError, WorkError) as error:
        print(f"not scored on the 16-bit base: {str(error).splitlines()[0]}")
        return None
