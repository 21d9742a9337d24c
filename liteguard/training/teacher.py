"""The base model as the teacher of `distill` rows: what it expects at each token of an answer.

Words that a model said itself still teach it something: to say them more often. On greedy answers
that sharpens every distribution, and text of other hands becomes less likely. The distribution that
the words were taken from pulls back to how the base answers, and nowhere else. All that a frozen
vocabulary head needs of one is its mean row (`loss_head.expected_rows`), so it is computed once,
before training, for every target of the run, and kept in the work directory.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from liteguard import distributed, machine, writing
from liteguard.errors import UserError
from liteguard.progress import Progress
from liteguard.training.packing import Lesson

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from liteguard.training.stage import Run, Stage
    from liteguard.training.tokens import TokenRows

FILE = "teacher.npy"
BATCH_TOKENS = 512
BYTES = 2  # of a value: float16, whose 11 bits are more than a bfloat16 head's own


def require_possible(stage: Stage, train: TokenRows) -> None:
    """Raise UserError where rows are to be distilled and this model or this run cannot."""
    if not any(train.soft):
        return
    from liteguard.training.loss_head import is_special

    if is_special(stage.architecture):
        why = f"the vocabulary head of {stage.architecture.model_type} is not one linear layer"
    elif distributed.uses_fsdp():
        why = "under FSDP no process holds the vocabulary head (use DDP)"
    else:
        return
    raise UserError(
        f"`distill` is not possible here: {why}. Set it to false for all sources of "
        "data.instruction, and prepare the data again."
    )


def taught_rows(trainer: Any) -> list[int]:
    """Numbers of the training rows of a run of stage 2 whose targets are distributions."""
    soft = trainer.data_collator.parts["train"].soft
    if not len(soft):
        return []
    used = {row for rows in trainer.train_dataset["rows"] for row in rows}
    return sorted(row for row in used if soft[row])


def prepare(stage: Run, trainer: Any, rows: list[int]) -> None:
    """Give the trainer's collator what the base model, without its adapter, expects at the targets
    of `rows`: from the work directory, if an interrupted run has written it there."""
    import numpy as np

    train = trainer.data_collator.parts["train"]
    counts = train.supervised[rows]
    path = stage.work / FILE
    print(f"distilled: {len(rows):,} rows learn what the base expects, not their words")
    distributed.write_once(path, _write, path, trainer, rows, int(counts.sum()))
    starts = dict(zip(rows, (np.cumsum(counts) - counts).tolist(), strict=True))
    trainer.data_collator.lesson = Lesson(starts, np.load(path, mmap_mode="r", allow_pickle=False))


def _write(path: Path, trainer: Any, rows: list[int], targets: int) -> None:
    """Write the lines of `Lesson.expected` for all targets of `rows`, as .npy."""
    import numpy as np
    import torch

    collator, model = trainer.data_collator, trainer.accelerator.unwrap_model(trainer.model)
    width = model.get_base_model().get_output_embeddings().weight.shape[1] + 1
    machine.check_disk(path, BYTES * width * targets / 1e9)
    progress = Progress("what the base expects", len(rows), unit="rows", quiet=True)
    model.eval()
    with writing.replacing(path) as beside, torch.no_grad(), contextlib.closing(progress):
        shape = (targets, width)
        lines = np.lib.format.open_memmap(beside, mode="w+", dtype=np.float16, shape=shape)
        place = 0
        for group in _groups(rows, collator.parts["train"].lengths):
            batch = collator([{"part": "train", "rows": group}])
            batch = {name: value.to(model.device) for name, value in batch.items()}
            with trainer.compute_loss_context_manager(), model.disable_adapter():
                found = model(**batch, fused_lm_head=True, teaching=True).expected
            lines[place : place + len(found)] = found.half().cpu().numpy()
            place += len(found)
            progress.add(int(batch["attention_mask"].sum()), len(group))
        assert place == targets, f"{place} of {targets} targets"
        lines.flush()
    model.train()


def _groups(rows: list[int], lengths: np.ndarray) -> list[list[int]]:
    """`rows` in order, as many at a time as BATCH_TOKENS allows, one at least."""
    found: list[list[int]] = [[]]
    total = 0
    for row in rows:
        if found[-1] and total + lengths[row] > BATCH_TOKENS:
            found.append([])
            total = 0
        found[-1].append(row)
        total += int(lengths[row])
    return found
