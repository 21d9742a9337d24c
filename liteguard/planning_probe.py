"""How fast this machine trains and measures: a few steps of the real scripts on the real base.

The scripts run as a user runs them, with few steps and small accumulation, in a directory that is
deleted afterwards. Speeds are taken from the moments at which their progress lines arrive; the
first step is left out, since it pays for what is made once.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from liteguard import models, records
from liteguard.checkpoints import STAGES
from liteguard.config import Config
from liteguard.errors import WorkError
from liteguard.records import Result
from liteguard.rows import load_split, read_manifest, source_titles
from liteguard.training import tokens
from liteguard.training.feed import CPU_MICRO_BATCH_TOKENS, needed_rows

ROOT = Path(__file__).resolve().parents[1]
STEPS = 5
# Rows of each kind that the probe of the evaluation measures: one batch of answers and a bit.
ROWS = 8


@dataclass(frozen=True)
class Moment:
    """A line of progress: the step that ended, or the evaluation after it, and when (seconds)."""

    step: int
    evaluation: bool
    at: float


@dataclass(frozen=True)
class Speed:
    """What a stage takes on this machine, in seconds."""

    start: float  # until the first step begins: imports, tokenizing, loading
    token: float  # of a training step
    evaluation: float  # of the validation rows, once, with the checkpoint that goes with it
    finish: float  # saving, and the scores on both bases

    def seconds(self, total_tokens: float, evaluations: int) -> float:
        """Of a whole stage that trains on so many tokens."""
        work = total_tokens * self.token + evaluations * self.evaluation
        return self.start + work + self.finish


@dataclass(frozen=True)
class Measuring:
    """What evaluate_model.py takes for a checkpoint on this machine, in seconds."""

    loading: float  # of each checkpoint; the script's start as well
    scored_token: float
    knowledge_row: float  # one question of each benchmark, all its options
    generated_token: float


@dataclass(frozen=True)
class Taught:
    """Rows of stage 2 whose targets are what the base model expects (`distill`), each once."""

    tokens: int
    targets: int


def taught_of(config: Config, data_dir: Path, tokenizer: Any) -> Taught:
    """What the base model has to be asked before the first step of stage 2."""
    needed = needed_rows(config.instruction)
    found = tokens.answers(tokenizer, data_dir, "train", config, needed)
    rows = [row for row in range(min(needed, len(found))) if len(found.soft) and found.soft[row]]
    return Taught(int(found.lengths[rows].sum()), int(found.supervised[rows].sum()))


def lengths_of(config: Config, stage: str, data_dir: Path, tokenizer: Any) -> list[int]:
    """Tokens of each row that a run of a stage trains on, in its order; a pair's are of both.

    The domain stage takes as many texts as fill its steps: there they are those of each step.
    """
    section = getattr(config, stage)
    needed = needed_rows(section)
    if stage == "domain":
        length = min(section.max_length, config.model.context_length)
        found = tokens.documents(tokenizer, data_dir, "train", config)
        # A step is filled with whole texts: on average half a text's length stays free.
        mean = float(found.lengths.mean())
        budget = section.batch_size * section.gradient_accumulation * length
        return [round(max(budget - mean / 2, mean))] * section.max_steps
    if stage == "instruction":
        found = tokens.answers(tokenizer, data_dir, "train", config, needed)
        row_lengths = found.lengths.tolist()
    else:
        rows = load_split(data_dir, "preference", "train")
        weights = tokens.kind_weights(config.safety, rows)
        titles = source_titles(read_manifest(data_dir), "preference")
        with contextlib.redirect_stdout(None):  # the mixture, which the stage itself prints
            pairs = tokens.render_preferences(
                tokenizer, rows, config, "train", needed, weights, titles
            )
        prompt, chosen, rejected = (
            [len(models.encode(tokenizer, pair[key])) for pair in pairs]
            for key in ("prompt", "chosen", "rejected")
        )
        row_lengths = [2 * a + b + c for a, b, c in zip(prompt, chosen, rejected, strict=True)]
    return [row_lengths[row % len(row_lengths)] for row in range(needed)]


def probe_config(config: Config, stage: str, cuda: bool) -> Config:
    """The configuration with STEPS short steps of a stage, micro-batches as in the real run."""
    section = getattr(config, stage)
    rows, accumulation = section.batch_size, section.gradient_accumulation
    length = min(section.max_length, config.model.context_length)
    if stage == "instruction":
        accumulation = max(1, min(accumulation, 16 // rows))
    elif cuda or stage == "safety":
        accumulation = 1
    else:
        # As few tokens as fill two micro-batches of a CPU, so that a slow one ends in minutes.
        while rows * accumulation * length > 2 * CPU_MICRO_BATCH_TOKENS and accumulation > 1:
            accumulation -= 1
        while rows > 1 and (rows - 1) * length >= 2 * CPU_MICRO_BATCH_TOKENS:
            rows -= 1
    changed: dict[str, Any] = {
        **{"batch_size": rows, "gradient_accumulation": accumulation, "max_steps": STEPS},
        **{"eval_steps": STEPS, "save_steps": STEPS, "logging_steps": 1, "report_to": []},
        **{"early_stopping_patience": 0, "warmup_steps": 0},
    }
    if stage == "safety":
        changed["chosen_drop_limit"] = None
    return config.model_copy(update={stage: section.model_copy(update=changed)})


def read_moments(stage: str, lines: Sequence[tuple[float, str]]) -> list[Moment]:
    """The progress lines among (seconds, line) of a stage's output."""
    found = []
    for at, line in lines:
        if match := re.match(rf"\s*{stage} (\d+)/\d+\s.*?(train|eval)_loss ", line):
            found.append(Moment(int(match[1]), match[2] == "eval", at))
    return found


def speed_of(moments: Sequence[Moment], step_tokens: Sequence[float], whole: float) -> Speed:
    """A stage's speed from its moments, the tokens of each of its steps, and its seconds in all.

    Raises WorkError where lines are missing.
    """
    steps = [each for each in moments if not each.evaluation]
    evaluations = [each for each in moments if each.evaluation]
    if len(steps) < 2:
        raise WorkError("the probe wrote no progress that could be timed")
    first, last = steps[0], steps[-1]
    # The median: on a machine with other work, a step now and then takes three times as long.
    token = statistics.median(
        (after.at - before.at) / step_tokens[after.step - 1]
        for before, after in itertools.pairwise(steps)
    )
    evaluation = max(evaluations[-1].at - last.at, 0.0) if evaluations else 0.0
    end = last.at + evaluation
    return Speed(
        start=max(first.at - step_tokens[0] * token, 0.0),
        token=token,
        evaluation=evaluation,
        finish=max(whole - end, 0.0),
    )


def run(command: Sequence[str], what: str) -> tuple[list[tuple[float, str]], float]:
    """([(seconds since the start, line of output)], seconds in all) of a script.

    Raises WorkError with its last lines when it fails.
    """
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / command[0]), *command[1:]],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    lines = []
    try:
        for line in process.stdout or ():
            lines.append((time.monotonic() - started, line.rstrip("\n")))
        process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise
    if process.returncode:
        last = " ".join(line.strip() for _, line in lines[-3:])
        raise WorkError(
            f"the probe of {what} failed (exit code {process.returncode}): {last}\n"
            "Run that script with --dry_run, or plan without a probe: --dry_run."
        )
    return lines, time.monotonic() - started


def train(
    config: Config,
    data_dir: Path,
    work: Path,
    lengths: dict[str, list[int]],
    cuda: bool,
    say: Callable[[str], None],
) -> dict[str, Speed]:
    """The speed of each stage, from STEPS steps of each, one after the other, below `work`."""
    found, parent = {}, None
    for stage in STAGES:
        say(f"  probing {stage}: {STEPS} steps")
        own = probe_config(config, stage, cuda)
        file = work / f"{stage}.yaml"
        file.write_text(yaml.safe_dump(own.model_dump(mode="json")), encoding="utf-8")
        command = [f"train_{stage}.py", "--config", str(file), "--data", str(data_dir.resolve())]
        command += ["--output", str(work / stage)]
        command += ["--checkpoint", str(parent)] if parent else []
        lines, whole = run(command, f"train_{stage}.py")
        step_tokens = tokens_of_steps(config, own, stage, lengths[stage])
        found[stage] = speed_of(read_moments(stage, lines), step_tokens, whole)
        parent = work / stage
    return found


def tokens_of_steps(real: Config, probe: Config, stage: str, lengths: list[int]) -> list[float]:
    """Tokens of each step of the probe, whose rows are the first of the real run's."""
    own, section = getattr(probe, stage), getattr(real, stage)
    rows = own.batch_size * own.gradient_accumulation
    if stage == "domain":
        share = rows / (section.batch_size * section.gradient_accumulation)
        return [lengths[0] * share] * own.max_steps
    return [
        float(sum(lengths[i % len(lengths)] for i in range(rows * step, rows * (step + 1))))
        for step in range(own.max_steps)
    ]


def measure(config: Config, data_dir: Path, work: Path, say: Callable[[str], None]) -> Measuring:
    """What measuring takes, from ROWS rows of each kind with the probe's last checkpoint."""
    say(f"  probing evaluate: {ROWS} rows of each kind")
    file = work / "evaluate.yaml"
    # Nothing of a probe goes to a paid judge.
    section = config.evaluate.model_copy(update={"llm_judge": None})
    alone = config.model_copy(update={"evaluate": section})
    file.write_text(yaml.safe_dump(alone.model_dump(mode="json")), encoding="utf-8")
    command = ["evaluate_model.py", "--config", str(file), "--data", str(data_dir.resolve())]
    command += ["--checkpoint", str(work / "safety"), "--limit", str(ROWS)]
    _, whole = run([*command, "--output", str(work / "evaluation")], "evaluate_model.py")
    (result,) = (work / "evaluation").glob("*.json")
    cost = records.read(Result, result).cost
    parts = ("scoring_s", "options_s", "generation_s", "as_used_s", "judging_s")
    counted = sum(getattr(cost, part) for part in parts)
    return Measuring(
        loading=max(whole - counted, 0.0),
        scored_token=cost.scoring_s / max(cost.scored_tokens, 1),
        knowledge_row=cost.options_s / ROWS,
        generated_token=cost.generation_s / max(cost.generated_tokens, 1),
    )
