"""Training itself: patches in order, resume, and smaller micro-batches when memory runs out."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from liteguard import checkpoints, distributed, machine, shown
from liteguard.errors import WorkError
from liteguard.machine import gpu_memory_gb
from liteguard.training import memory_estimate, patches
from liteguard.training.arguments import warmup_steps
from liteguard.training.callbacks import progress, stopped_early, unlearns
from liteguard.training.feed import Counts
from liteguard.training.isolation import PackingRefused
from liteguard.training.stage import Run, Stage, last_checkpoint

# In the work directory of several processes: the micro-batches that one of them asked for.
MICRO_BATCH = "micro_batch.json"


def train_within_memory(
    train: Callable[[int, int], Any],
    batch_size: int,
    gradient_accumulation: int,
    explain: Callable[[], str],
    processes: int = 1,
    keep: Callable[[dict[str, int]], None] = lambda shape: None,
) -> tuple[Any, list[dict[str, Any]]]:
    """(what `train` returned, the steps that ran out of memory, for stage.json).

    `train(batch_size, gradient_accumulation)` is called with the given values and, each time it
    raises torch.OutOfMemoryError, again with half the micro-batch and twice the accumulation: the
    effective batch and so the result stay the same. An odd micro-batch of b goes to the largest
    smaller divisor of the effective batch. At micro-batch 1 a WorkError with `explain()`, the
    estimate and the settings to change. `train` has to resume from its last checkpoint.

    Of several processes one runs out of memory, and the others wait for its gradients: it cannot go
    on without them. There the smaller shape is handed to `keep` and a WorkError asks for another
    start, which goes on with it.
    """
    import gc

    import torch

    ladder: list[dict[str, Any]] = []
    effective = batch_size * gradient_accumulation
    while True:
        try:
            return train(batch_size, gradient_accumulation), ladder
        except torch.OutOfMemoryError as error:
            message = str(error).splitlines()[0] if str(error) else type(error).__name__
        # Outside the handler: the exception's traceback would keep the failed model's tensors.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        ladder.append(
            {
                "batch_size": batch_size,
                "gradient_accumulation": gradient_accumulation,
                "error": message,
            }
        )
        if batch_size == 1:
            raise WorkError(f"Out of memory at micro-batch 1 ({message}).\n{explain()}")
        smaller = next(b for b in range(batch_size // 2, 0, -1) if effective % (b * processes) == 0)
        if processes > 1:
            shape = {"batch_size": smaller, "gradient_accumulation": effective // smaller}
            keep(shape)
            raise WorkError(
                f"Out of memory with micro-batch {batch_size} in one of {processes} processes "
                f"({message}).\nRun the same command again: it goes on from the last checkpoint "
                f"with {smaller} x {effective // smaller} (same effective batch)."
            )
        print(
            f"out of memory with micro-batch {batch_size} x {gradient_accumulation}: going on from "
            f"the last checkpoint with {smaller} x {effective // smaller} (same effective batch)"
        )
        batch_size, gradient_accumulation = smaller, effective // smaller


def run(
    stage: Run, make_trainer: Callable[[Stage], tuple[Any, Counts]]
) -> tuple[Any, dict[str, Any]]:
    """(trainer, metrics) of a finished run, with smaller micro-batches if memory runs out.

    `make_trainer` builds a trainer for a stage and says what each of its steps computes. After an
    out-of-memory error it is asked for one with half the micro-batch and twice the accumulation,
    which goes on from the last checkpoint: the optimizer steps stay the same. So they do for a
    model that must not be packed, which is trained on padded rows.
    """
    refused: list[str] = []
    first: list[Counts] = []
    shape_file = stage.work / MICRO_BATCH

    def attempt(batch_size: int, accumulation: int) -> tuple[Any, dict[str, Any]]:
        shape = {"batch_size": batch_size, "gradient_accumulation": accumulation}
        shape |= {"packing": False} if refused else {}
        section = stage.section.model_copy(update=shape)
        config = stage.config.model_copy(update={stage.name: section})
        reduced = replace(stage, config=config)
        trainer, counts = make_trainer(reduced)
        first.append(counts)
        if (counts.tokens != first[0].tokens).any():
            print(
                f"{stage.name}: texts are spread over micro-batches otherwise now, so from here on "
                "its steps hold other texts than they would have held"
            )
        try:
            return trainer, train(reduced, trainer, counts)
        except PackingRefused as error:
            refused.append(str(error))
        print(f"{refused[0]}\n{stage.name}: going on with padded rows (same steps, same loss)")
        del trainer  # and its model, before the next one is loaded
        machine.release_memory()
        return attempt(batch_size, accumulation)

    section = stage.section
    shape = distributed.on_main(checkpoints.read_dict, shape_file) or {
        "batch_size": section.batch_size,
        "gradient_accumulation": section.gradient_accumulation,
    }
    (trainer, metrics), ladder = train_within_memory(
        attempt,
        **shape,
        explain=lambda: memory_estimate.explain(stage.config, stage.name, stage.architecture),
        processes=distributed.world_size(),
        keep=lambda shape: checkpoints.write_json(shape_file, shape),
    )
    extra = {"packing_refused": refused[0]} if refused else {}
    return trainer, {**metrics, "out_of_memory": ladder, **extra}


def train(stage: Run, trainer: Any, counts: Counts) -> dict[str, Any]:
    """Run the trainer, from its last checkpoint if there is one; returns the stage's metrics."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(progress(stage, counts))
    patches.prepare(stage, trainer, counts)
    resume = distributed.on_main(last_checkpoint, stage.work)
    if resume:
        print(f"resuming from {resume.name}")
    warmup, asked = warmup_steps(stage.section), stage.section.warmup_steps
    if warmup != asked:
        print(
            f"{stage.name}: warm-up over {warmup} steps, not warmup_steps: {asked} "
            f"({stage.section.max_steps} steps, lr_scheduler {stage.section.lr_scheduler})"
        )
    started, cpu_started = time.monotonic(), time.process_time()
    first = int(resume.name.rsplit("-", 1)[1]) if resume else 0
    if resume:
        state = json.loads((resume / "trainer_state.json").read_text(encoding="utf-8"))
        if stopped_early(stage.section, state["log_history"]):
            # Killed between its end and publishing. Of steps that are left the trainer would take
            # one before it looks whether it should.
            done = len(trainer.train_dataset) * first // stage.section.max_steps
            trainer.train_dataset = trainer.train_dataset.select(range(done))
            trainer.args.max_steps = first
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
    hours = round(seconds / 3600 * trainer.args.world_size * (trainer.args.n_gpu > 0), 4)
    metrics = {
        "steps": last,
        "warmup_steps": warmup,
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
        "gpu_hours": hours,
        "resumed_from": resume.name if resume else None,
    }
    gpu = f", GPU {gpu_memory_gb():.1f} GB; {shown.duration(3600 * hours)} of GPU time"
    print(
        f"{stage.name}: {last} steps, {seen:,} tokens ({supervised:,} supervised, padding "
        f"{metrics['padding_share']:.0%}), {metrics['tokens_per_s']:,.0f} tokens/s "
        f"({metrics['supervised_tokens_per_s']:,.0f} supervised); {shown.duration(seconds)}; "
        f"peak memory {machine.peak_rss_gb():.1f} GB" + gpu * bool(hours)
    )
    return metrics
