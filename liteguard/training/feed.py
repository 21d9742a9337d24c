"""What the trainer is fed: rows into micro-batches, counted and described before the run."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from liteguard import checkpoints, distributed, machine, models, shown
from liteguard.config import TrainSection
from liteguard.errors import UserError
from liteguard.training import memory_estimate, micro_batch, packing, teacher
from liteguard.training.stage import Stage
from liteguard.training.tokens import TokenRows

if TYPE_CHECKING:
    import numpy as np


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


def make_feed(stage: Stage, tokenizer: Any, train: TokenRows, held_out: TokenRows) -> Feed:
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
    order = micro_batch.repeat_order(len(train), section.seed, shuffle_first=stage.name == "domain")
    if stage.name == "domain":
        budget = rows_per_step * min(section.max_length, stage.config.model.context_length)
        steps = micro_batch.steps_of_tokens(order, lengths, budget, section.max_steps)
    else:
        steps = micro_batch.steps_of_rows(order, rows_per_step, section.max_steps)
    steps, batches, count = spread_steps(stage, lengths, steps)
    sizes = np.array([[lengths[b].sum(), len(b) * lengths[b].max()] for b in batches])
    per_step = sizes.reshape(len(steps), count, 2).sum(1)
    supervised = train.supervised
    items = {"part": ["train"] * len(batches), "rows": batches}
    reduction = getattr(section, "loss_reduction", "token")
    if reduction != "token":
        weights = micro_batch.row_weights(steps, supervised, reduction)
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
        accumulation=count // distributed.world_size(),
        counts=Counts(
            tokens=per_step[:, 0],
            supervised=np.array([supervised[step].sum() for step in steps]),
            padding=(per_step[:, 1] - per_step[:, 0]) * (not section.packing),
        ),
    )


def spread_steps(
    stage: Stage, lengths: np.ndarray, steps: list[list[int]]
) -> tuple[list[list[int]], list[list[int]], int]:
    """(rows of each optimizer step, rows of each micro-batch, micro-batches a step).

    Long texts that fill a micro-batch alone may not fit as many as a step of stage 1 has: its steps
    are then planned anew, with fewer of them each.
    """
    section, processes = stage.section, distributed.world_size()
    if not section.packing and stage.name != "domain":
        found = micro_batch.padded_micro_batches(steps, lengths, section.batch_size, processes)
        return steps, *found
    longest = min(section.max_length, stage.config.model.context_length)
    capacity = section.batch_size * longest
    spread = micro_batch.padded_micro_batches_of_texts
    if section.packing:
        capacity, spread = micro_batch_tokens(stage, lengths), micro_batch.micro_batches
    try:
        return steps, *spread(steps, lengths, capacity, processes)
    except UserError:
        if stage.name != "domain":
            raise
    order = micro_batch.repeat_order(len(lengths), section.seed, shuffle_first=True)
    budget = section.batch_size * section.gradient_accumulation * longest
    groups = max(budget // capacity // processes, 1) * processes
    if section.packing:
        steps = micro_batch.steps_of_groups(order, lengths, capacity, groups, section.max_steps)
        return steps, *micro_batch.micro_batches(steps, lengths, capacity, processes)
    batches = micro_batch.padded_steps_of_groups(
        order, lengths, capacity, groups, section.max_steps
    )
    parts = [batches[i : i + groups] for i in range(0, len(batches), groups)]
    return [[row for part in step for row in part] for step in parts], batches, groups


def pair_order(section: TrainSection, pairs: int) -> list[int]:
    """The pairs of a run of stage 3 in order, `batch_size` x `gradient_accumulation` a step.

    The first pass keeps their order, the mixture; further ones are shuffled, as in stage 2.
    """
    order = micro_batch.repeat_order(pairs, section.seed, shuffle_first=False)
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


def needed_rows(section: TrainSection) -> int:
    """Rows that `max_steps` optimizer steps consume."""
    return section.max_steps * section.batch_size * section.gradient_accumulation


def describe(
    stage: Stage, sample: str, what: str, rows: int, passes: float, tokens: int, dry_run: bool
) -> None:
    """Print what a run is going to do and the memory it may take, by term in a dry run.

    tokens: of the largest micro-batch. Raises UserError where the machine has too little memory.
    """
    import torch

    print(
        f"{stage.name}: {stage.section.max_steps} steps of {what} = {passes:.2f} epochs of "
        f"{rows:,} rows; output {stage.output}"
    )
    print(f"first sequence:\n{shown.visible(sample[:600])}\n")
    try:
        expected = memory_estimate.estimate(stage.config, stage.name, stage.architecture, tokens)
    except UserError as error:  # an architecture without a formula
        print(error)
        return
    if dry_run:
        needed, card = memory_estimate.card_for(stage.config, stage.name, stage.architecture)
        print(f"{expected.table()}\n")
        print(
            f"on a GPU, at the longest rows: {needed / 1e9:.1f} GB: "
            f"{card or 'more than one card has'} (minutes and disk: python plan.py)"
        )
    host = memory_estimate.host_memory(expected, models.count_parameters(stage.architecture))
    advice = memory_estimate.advice(stage.config, stage.name)
    if expected.cuda:
        needed, free = expected.total + expected.margin, torch.cuda.mem_get_info()[0]
        print(f"expected peak GPU memory: {needed / 1e9:.1f} GB of {free / 1e9:.1f} GB free")
        if needed > free:
            # Not refused: the estimate is an upper bound, and a smaller micro-batch is the way on.
            print(f"  should it run out, micro-batches are halved; {advice} needs less")
    print(f"expected peak memory: {host}")
    machine.require_memory(host.needed, f"stage {stage.name}", f"; or set {advice}.")


def require_disk(stage: Stage, overwrite: bool) -> None:
    """Raise UserError where the disk has no room for a stage's checkpoints and its adapter.

    What an interrupted run left is gone on with or replaced. A stage that is finished is reused.
    """
    if (stage.output / checkpoints.RECORD).is_file() and not overwrite:
        return
    needed = 1e9  # for an architecture without a formula
    with contextlib.suppress(UserError):
        expected = memory_estimate.estimate(stage.config, stage.name, stage.architecture)
        needed = memory_estimate.stage_disk(stage.section, expected)
    machine.require_disk(stage.output, needed - checkpoints.left_over(stage.output))


def describe_feed(
    stage: Stage,
    tokenizer: Any,
    train: TokenRows,
    held_out: TokenRows,
    dry_run: bool,
) -> None:
    """`describe` for stages 1 and 2."""
    teacher.require_possible(stage, train)
    section, found = stage.section, make_feed(stage, tokenizer, train, held_out)
    counts = found.counts
    rows = stage.rows["train"]
    trained = sum(map(len, found.train["rows"]))
    sizes = f"{counts.tokens.mean():,.0f} tokens ({counts.supervised.mean():,.0f} supervised)"
    batches = len(found.train) // section.max_steps
    shape = f" in {batches} micro-batches" if batches > 1 else ""
    shape += ", no padding" if section.packing else f", {counts.padding.mean():,.0f} padding"
    ids = train.row(found.train[0]["rows"][0])[0]
    passes = trained / len(train) if stage.name == "domain" else trained / rows
    sizes_of = (train.lengths[batch] for batch in found.train["rows"])
    largest = max(int(n.sum() if section.packing else len(n) * n.max()) for n in sizes_of)
    sample = tokenizer.decode(ids)
    describe(stage, sample, f"{sizes}{shape}", rows, passes, largest, dry_run)
