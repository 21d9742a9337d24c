"""The same numbers for wandb, TensorBoard and trackio, under the same names.

Transformers' own callbacks log other keys to each; here all get `train_loss`, `eval_loss`,
`learning_rate`, `gpu_memory` (GB) and `tokens_per_second`, by optimizer step.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol


class Tracker(Protocol):
    """Where numbers go."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of an optimizer step."""

    def finish(self) -> None:
        """Write what is left and close."""


class _Runs:
    """wandb and trackio, which have the same interface."""

    def __init__(self, library: Any, name: str, config: Mapping[str, Any]) -> None:
        self._library = library
        # They write in colours, which are shown as escapes otherwise.
        with contextlib.redirect_stdout(getattr(sys.stdout, "stream", sys.stdout)):
            library.init(project="liteguard", name=name, config=dict(config))

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._library.log(dict(values), step=step)

    def finish(self) -> None:
        with contextlib.redirect_stdout(getattr(sys.stdout, "stream", sys.stdout)):
            self._library.finish()


class _TensorBoard:
    """Event files in runs/<name>; steps that a resumed run repeats replace the old ones."""

    def __init__(self, name: str, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(Path("runs") / name), purge_step=first_step)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)
        self._writer.flush()

    def finish(self) -> None:
        self._writer.close()


def start(
    tools: Sequence[str], name: str, config: Mapping[str, Any], first_step: int
) -> list[Tracker]:
    """One tracker for each of `tools` (wandb, tensorboard, trackio).

    Args:
        tools: a stage's `report_to`.
        name: of the run, e.g. smollm2-domain.
        config: flat configuration to keep beside the numbers.
        first_step: optimizer step that the run starts or goes on after.
    """
    trackers: list[Tracker] = []
    for tool in tools:
        if tool == "tensorboard":
            trackers.append(_TensorBoard(name, first_step))
        else:
            trackers.append(_Runs(importlib.import_module(tool), name, config))
    return trackers
