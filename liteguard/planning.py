"""Memory, minutes and disk of the six steps on this machine, and the card that would do.

Memory and disk are computed from the model's shapes, as the scripts do before their work. Minutes
of training and measuring come from a probe (planning_probe.py); those of preparing, compressing
and a bundle's answers from measurements on two cores (benchmarks/data_report.json and
full_size_report.json, and the demo's), scaled by what the probe says of this machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from liteguard import memory, models, registry
from liteguard.checkpoints import STAGES
from liteguard.config import Config
from liteguard.data import self_answers, sets
from liteguard.evaluation import answerers, as_used
from liteguard.evaluation.held_out import REQUESTS
from liteguard.export import calibration, quantization, smoothing, tflite
from liteguard.export.measured import DRAWN
from liteguard.planning_probe import Measuring, Speed, Taught
from liteguard.training import memory_estimate, teacher
from liteguard.training.feed import CPU_MICRO_BATCH_TOKENS

# Measured on two cores. Tokens x parameters a second in stage 2 of the demo:
REFERENCE_SPEED = 420 * 134.5e6
# Preparing (benchmarks/data_report.json): seconds, seconds a row; bytes, bytes a row.
PREPARE = (10.0, 5.0e-4, 450e6, 900.0)
# Merge, export, quantise and bundle: seconds, seconds per billion parameters.
CONVERT = (40.0, 110.0)
# Calibration: seconds, seconds per billion parameters (SmolLM2: 38 to 46; docs/experiments.md).
# Smoothing: from its operations. Neither was measured at Phi's size.
CALIBRATE = (5.0, 290.0)
SMOOTH = (6.0, 30.0)
# The base model as a teacher reads its rows once: of a training step's time for as many tokens (660
# tokens/s beside 150 to 185 of SmolLM2's stage 2, in one run).
TEACHING = 0.25
# The proof of one recipe: seconds, seconds per billion parameters and answer. Where the change of
# the perplexity is close to its tolerance, scoring more texts takes up to three minutes longer.
PROVE = (58.0, 2.4)
# A bundle's answers: seconds to open, parameters x tokens a second of all its processes.
BUNDLE = (4.0, 18.0e9)
# Published shapes, for a plan before anything is downloaded.
PHI = {"microsoft/phi-1_5": "phi-1_5", "microsoft/phi-2": "phi-2"}
SMOLLM2 = "embedded:smollm2-135m-instruct"


@dataclass(frozen=True)
class Step:
    """What one of the six steps takes; None: not known."""

    name: str
    seconds: float | None
    memory: float  # bytes of the host
    disk: float  # bytes that it adds, at its most
    gpu: float | None = None  # bytes of a GPU, where it would use one
    note: str = ""


def base_here(config: Config) -> tuple[Any | None, str]:
    """(the base model's transformers config, why there is none): nothing is downloaded."""
    from transformers import AutoConfig

    model = config.model
    if model.path:
        return models.model_config(config)[2], ""
    if model.name in registry.MODELS:
        home = Path(config.data.cache_dir) / "models" / model.name.removeprefix("embedded:")
        if (home / "config.json").is_file():
            return AutoConfig.from_pretrained(home), ""
        return None, f"the base model {model.name} is not unpacked yet (stage 1 does that)"
    from huggingface_hub import try_to_load_from_cache

    revision = model.revision or "main"
    file = try_to_load_from_cache(model.name, "config.json", revision=revision)
    weights = Path(file).parent.glob("*.safetensors") if isinstance(file, str) else ()
    if isinstance(file, str) and any(weights):
        return AutoConfig.from_pretrained(Path(file).parent), ""
    return None, f"the base model {model.name} is not downloaded yet (stage 1 does that)"


def smollm2_architecture() -> Any:
    """The published config of SmolLM2-135M-Instruct, shapes only."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )


def shapes(config: Config) -> tuple[Any | None, str]:
    """`base_here`, or the published shapes of a known model that is not here."""
    found, why = base_here(config)
    name = config.model.name.lower()
    if found is None and name in PHI:
        return memory.phi_architecture(PHI[name]), why  # type: ignore[arg-type]
    if found is None and name == SMOLLM2:
        return smollm2_architecture(), why
    return found, why


def evaluations(config: Config, stage: str) -> int:
    """How often a stage validates."""
    section = getattr(config, stage)
    return section.max_steps // section.eval_steps


def training_step(
    config: Config,
    stage: str,
    architecture: Any,
    cuda: bool,
    lengths: list[int] | None,
    speed: Speed | None,
    taught: Taught | None = None,
) -> Step:
    """One of the three training stages. lengths: of its rows, where data are prepared; taught:
    those of stage 2 whose targets the base model gives, first of all."""
    section = getattr(config, stage)
    most = section.batch_size * min(section.max_length, config.model.context_length)
    most *= 2 if stage == "safety" else 1
    if not cuda and stage != "safety":
        longest = max(lengths) if lengths and stage != "domain" else section.max_length
        most = min(most, max(CPU_MICRO_BATCH_TOKENS, longest))
    elif stage == "safety" and lengths and not cuda:
        most = min(most, section.batch_size * max(lengths))
    expected = memory_estimate.estimate(config, stage, architecture, most)
    parameters = models.count_parameters(architecture)
    host = memory_estimate.host_memory(expected, parameters)
    disk = memory_estimate.stage_disk(section, expected)
    seconds = None
    if speed is not None and lengths is not None:
        seconds = speed.seconds(sum(lengths), evaluations(config, stage))
    if taught is not None:
        disk += teacher.BYTES * (architecture.get_text_config().hidden_size + 1) * taught.targets
        if seconds is not None and speed is not None:
            seconds += TEACHING * speed.token * taught.tokens
    gpu = expected.total + expected.margin if cuda else None
    return Step(stage, seconds, host.peak, disk, gpu)


def slowness(speeds: dict[str, Speed], parameters: int, cuda: bool, cores: int) -> float:
    """How much longer than on the two cores measured on the CPU's work takes here.

    From stage 2's speed where it trained on the CPU; otherwise from the number of cores, of which a
    conversion uses few.
    """
    if cuda or "instruction" not in speeds:
        return max(2 / cores, 0.5)
    return REFERENCE_SPEED / (parameters / speeds["instruction"].token)


def asked_tokens(config: Config) -> int:
    """Tokens of the base model's own answers that preparation asks for, at their longest.

    A source without `limit` counts as nothing: how many questions it has is not known here.
    """
    return sum((each.limit or 0) * each.max_new_tokens for each in self_answers.sources(config))


def prepare_step(
    config: Config, rows: int | None, slow: float | None, speed: Measuring | None
) -> Step:
    """Stage 0. rows: in the manifest of prepared data, or None before that."""
    fixed_s, row_s, fixed, per_row = PREPARE
    asked = asked_tokens(config)
    seconds, note = None, "its minutes are known once it has run"
    if rows is not None:
        note = "done"
        if slow is not None and speed is not None:
            seconds = slow * (fixed_s + row_s * rows) + speed.generated_token * asked
    elif asked:
        note = f"the base model writes up to {asked:,} tokens of answers; {note}"
    known = rows or 0
    return Step("prepare", seconds, fixed + per_row * known, 1500.0 * known, note=note)


def proof_answers(config: Config) -> int:
    """Answers that a proof takes of a bundle: greedy ones, and those drawn as an app does."""
    verify = config.compress.verify
    if verify.level == "none":
        return 0
    harmful = min(-(-verify.requests // len(REQUESTS)), DRAWN)
    return verify.questions + verify.requests + harmful * config.evaluate.as_used.draws


def compress_step(config: Config, architecture: Any, slow: float | None) -> Step:
    """The conversion and its proof, for the first recipe that is tried."""
    section = config.compress
    parameters = models.count_parameters(architecture)
    converter = tflite.choose_converter(section.converter, section.python)
    peak = tflite.peak_memory(parameters, converter)
    recipes = quantization.recipes_for(section, architecture)
    disk = tflite.whole_disk(parameters, converter, recipes[0])
    billions = parameters / 1e9
    answers = proof_answers(config)
    proof = (PROVE[0] + PROVE[1] * billions * answers) if answers else 0.0
    if calibration.folder(Path(), recipes[0], config):
        proof += CALIBRATE[0] + CALIBRATE[1] * billions  # of each recipe that is tried
    seconds = CONVERT[0] + CONVERT[1] * billions + proof
    if smoothing.wanted(config, recipes):
        seconds += SMOOTH[0] + SMOOTH[1] * billions
    more = len(recipes) - 1
    note = ""
    if more and answers:
        longest = None if slow is None else slow * (seconds + more * proof)
        note = f"{minutes(longest)} if all {more + 1} recipes are tried"
    return Step("compress", None if slow is None else slow * seconds, peak, disk, note=note)


def evaluate_step(
    config: Config, architecture: Any, speed: Measuring | None, slow: float | None, targets: int
) -> Step:
    """Measuring `targets` checkpoints and a bundle, at the longest answers that are allowed."""
    section = config.evaluate
    needed, pages = answerers.expected_memory(config, architecture, None)
    seen = section.question_rows if section.seen_question_rows is None else 0
    answers = section.question_rows + (section.seen_question_rows or seen)
    answers += section.harmful_rows + 2 * section.benign_rows
    texts, ways = section.perplexity_rows, section.as_used.draws + len(as_used.CONDITIONS) - 1
    answers += section.as_used.rows * ways
    for outside in section.sets:  # of as many rows as are wanted, if its file has them
        rows, kind = sets.wanted(config, outside, outside.kind), outside.kind
        answers += rows if kind != "texts" else 0
        answers += min(section.as_used.rows, rows) * ways if kind == "harmful" else 0
        texts += rows if kind in ("questions", "texts") else 0
    generated = answers * section.max_new_tokens
    scored = texts * section.max_text_tokens
    seconds = None
    if speed is not None and slow is not None:
        one = speed.scored_token * scored + speed.generated_token * generated
        options = speed.knowledge_row * section.knowledge_rows
        one += options
        parameters = models.count_parameters(architecture)
        own = BUNDLE[0] + (generated + scored) * parameters / BUNDLE[1]
        # A bundle scores options at about half the speed of a checkpoint (full_report.json).
        seconds = targets * (speed.loading + one) + slow * own + 2 * options
    note = f"{targets} checkpoints and the bundle, answers of {section.max_new_tokens} tokens"
    return Step("evaluate", seconds, needed + pages, 50e6, note=note)


def cards(config: Config, architecture: Any) -> list[str]:
    """Which GPU would do for each stage, and with which settings a smaller one."""
    lines = []
    for stage in STAGES:
        needed, name = memory_estimate.card_for(config, stage, architecture)
        line = f"  {stage:12} {needed / 1e9:5.1f} GB: {name or 'more than one card has'}"
        small = {"batch_size": 1, "gradient_checkpointing": True}
        section = getattr(config, stage).model_copy(update=small)
        changed = config.model_copy(update={stage: section})
        less, smaller = memory_estimate.card_for(changed, stage, architecture)
        if smaller and smaller != name:
            line += (
                f"; {smaller} with batch_size 1, gradient_checkpointing true and the same "
                f"effective batch ({less / 1e9:.1f} GB)"
            )
        lines.append(line)
    return lines


def minutes(seconds: float | None) -> str:
    """'14 min', '0.4 min', '3.2 h', or '?'."""
    if seconds is None:
        return "?"
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds < 600 else f"{math.ceil(seconds / 60)} min"


def table(steps: list[Step], free_memory: int | None, free_disk: int) -> str:
    """The steps, their sum, and what of it this machine does not have."""
    lines = [f"{'step':12}{'time':>10}{'memory':>10}{'GPU':>10}{'disk':>10}"]
    for step in steps:
        gpu = f"{step.gpu / 1e9:.1f} GB" if step.gpu else "-"
        lines.append(
            f"{step.name:12}{minutes(step.seconds):>10}{step.memory / 1e9:>7.1f} GB{gpu:>10}"
            f"{step.disk / 1e9:>7.1f} GB  {step.note}".rstrip()
        )
    known = [step.seconds for step in steps if step.seconds is not None]
    total = sum(known) if known and len(known) == len(steps) else None
    peak, disk = max(step.memory for step in steps), sum(step.disk for step in steps)
    lines.append(f"{'all':12}{minutes(total):>10}{peak / 1e9:>7.1f} GB{'':10}{disk / 1e9:>7.1f} GB")
    if free_memory is not None and peak > free_memory:
        lines.append(f"memory: {free_memory / 1e9:.1f} GB is free here; see docs/memory.md")
    if disk > free_disk:
        lines.append(f"disk: {free_disk / 1e9:.1f} GB is free here; choose another --output")
    return "\n".join(lines)
