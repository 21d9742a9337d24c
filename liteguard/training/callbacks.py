"""What happens beside training: progress, tracking, stopping, and a batch that gives no number."""

from __future__ import annotations

import math
import time
from typing import Any

from liteguard import distributed, shown, writing
from liteguard.config import TrainSection, flatten
from liteguard.errors import WorkError
from liteguard.machine import gpu_memory_gb
from liteguard.training import tracking
from liteguard.training.arguments import trainer_arguments
from liteguard.training.feed import Counts
from liteguard.training.stage import Run, Stage


def stage_callbacks(stage: Run) -> list[Any]:
    """The stop on gradients that are not finite, early stopping, and the guard of stage 3."""
    from transformers import EarlyStoppingCallback, TrainerCallback

    section: Any = stage.section  # has limits of its own in stage 3
    arguments = trainer_arguments(stage)

    class Guard(TrainerCallback):
        """Stops a run before it learns from what is not finite, or unlearns its answers."""

        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            import torch

            if args.fp16:
                return  # the gradient scaler skips such steps by itself
            found = [p.grad.sum() for p in model.parameters() if p.grad is not None]
            if found and not torch.stack([g.float() for g in found]).sum().isfinite():
                raise not_finite(stage, f"a gradient in step {state.global_step + 1}")

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % section.save_steps == 0:
                control.should_save = True
            if arguments["load_best_model_at_end"] and state.global_step == state.max_steps:
                # The best checkpoint is chosen among those that were evaluated and saved.
                control.should_evaluate = control.should_save = True

        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            if not math.isfinite(metrics.get("eval_loss", 0.0)):
                raise not_finite(stage, f"the validation loss of step {state.global_step}")
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


def _chosen_drop(section: Any, metrics: dict[str, float]) -> float:
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


def not_finite(stage: Run, what: str) -> WorkError:
    return WorkError(
        f"{stage.name}: {what} is not finite, so the run was stopped before anything was learned "
        f"from it. The last good checkpoint is kept in {stage.work}. Lower "
        f"{stage.name}.learning_rate, or set model.compute_dtype to float32."
    )


def keep_bad_batch(stage: Run) -> Any:
    """What to do with a batch whose loss is not finite: keep it, and stop."""

    def keep(batch: dict[str, Any]) -> None:
        from safetensors.torch import save_file

        path = stage.work / "bad_batch.safetensors"
        with writing.replacing(path) as beside:
            save_file({k: tensor.cpu().contiguous() for k, tensor in batch.items()}, str(beside))
        raise not_finite(stage, f"the loss of the batch in {path} (ids, mask, labels)")

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
            self.begun, self.first = self.clock, self.step
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

        def left(self, state):
            """How long the remaining steps take, evaluations included as far as they came."""
            done, remaining = state.global_step - self.first, state.max_steps - state.global_step
            seconds = (time.monotonic() - self.begun) / max(done, 1) * remaining
            return f"  {shown.duration(seconds)} left" if seconds > 10 else ""

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
            numbers = {name: float(logs[key]) for key, name in names.items() if key in logs}
            numbers["gpu_memory"] = gpu_memory_gb()
            numbers |= speeds
            # An evaluation's time is not the steps'.
            self.clock, self.step = time.monotonic(), state.global_step
            for tracker in self.trackers:
                tracker.log(numbers, state.global_step)
            text = "  ".join(
                [
                    f"{key} {value:.4g}"
                    for key, value in numbers.items()
                    if value and key not in speeds
                ]
            )
            if speeds:
                found, supervised = speeds.values()
                text += f"  {found:,.0f} tok/s ({supervised:,.0f} supervised)"
            if self.bar.disable:
                place = f"{state.global_step}/{state.max_steps}"
                print(f"  {stage.name} {place}  {text}{self.left(state) if speeds else ''}")
            else:
                self.bar.set_postfix_str(text)

        def on_train_end(self, args, state, control, **kwargs):
            self.bar.close()
            for tracker in self.trackers:
                tracker.finish()

    return Progress()
