"""How much memory a stage takes, on a GPU and on its host, and what would lower it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from liteguard import models
from liteguard.config import Config, TrainSection
from liteguard.errors import UserError
from liteguard.training.memory_terms import (
    CUBLAS_WORKSPACE,
    UNMODELLED_SHARE,
    Head,
    Precision,
    adapter_matrices,
    frozen_weights,
    head_bytes,
    layer_activations,
    layer_work,
    optimizer_states,
    read_shapes,
    stream_bytes,
)

if TYPE_CHECKING:
    import torch


@dataclass
class MemoryEstimate:
    """Peak memory in bytes. `always` is held all the time; of `phases` only the largest counts."""

    title: str
    always: dict[str, int]
    phases: dict[str, dict[str, int]]
    cuda: bool
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def total(self) -> int:
        """Bytes at the peak, without the margin."""
        return sum(self.always.values()) + sum(self.phases[self.peak_phase].values())

    @property
    def margin(self) -> int:
        """What a GPU's "peak allocated" may have beyond the terms: cuBLAS workspaces, and 5 % for
        kernels' temporaries and rounding to 512-byte blocks. 0 on a CPU."""
        return CUBLAS_WORKSPACE + round(UNMODELLED_SHARE * self.total) if self.cuda else 0

    def table(self) -> str:
        """The terms as text, in GB (10^9 bytes)."""
        lines = [self.title]
        lines += [f"  {name:44}{size / 1e9:8.3f} GB" for name, size in self.always.items()]
        for phase, terms in self.phases.items():
            at_peak = phase == self.peak_phase
            mark = "at the peak" if at_peak else "at another time, smaller"
            lines.append(f"  {phase} ({mark}):")
            lines += [f"    {name:42}{size / 1e9:8.3f} GB" for name, size in terms.items()]
        lines.append(f"  {'peak':44}{self.total / 1e9:8.3f} GB")
        if self.cuda:
            lines.append(
                f"  {'margin: cuBLAS 32 MiB, 5 % not modelled':44}{self.margin / 1e9:8.3f} GB"
            )
            lines.append(
                "  The driver's context (about 0.3 to 0.6 GB) and fragmentation come on top of "
                "what torch counts as allocated."
            )
        return "\n".join(lines)


def estimate(
    config: Config,
    stage_name: str,
    architecture: Any,
    tokens: int | None = None,
    supervised: int | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    head: Head | None = None,
    fused_gelu: bool = True,
) -> MemoryEstimate:
    """Peak memory of a training stage.

    architecture: the base model's transformers config. tokens: in one micro-batch; the default is
    the most that the settings allow, batch_size x max_length (twice that for preference pairs).
    supervised: tokens of them that are scored; default: all. dtype and device: of the arithmetic;
    default: what `models.choose_dtype` picks here. head: how logits are made (`head_bytes`);
    default: what the trainers use on that device. fused_gelu: whether `models.fuse_gelu` was
    applied, as `models.load_base` does.
    """
    import torch

    section = getattr(config, stage_name)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype is None:
        dtype, _ = models.choose_dtype(config.model.compute_dtype, architecture.model_type)
    preference = stage_name == "safety"
    if tokens is None:
        length = min(section.max_length, config.model.context_length)
        tokens = section.batch_size * length * (2 if preference else 1)
    supervised = tokens if supervised is None else supervised
    shapes = read_shapes(architecture)
    if fused_gelu and shapes.activation == "gelu_new":
        shapes = replace(shapes, activation="gelu_pytorch_tanh")
    storage = section.quantization or config.model.quantization
    precision = Precision(
        compute=dtype.itemsize, nf4=storage == "nf4", cuda=device.startswith("cuda")
    )
    head = head or ("tiled" if precision.cuda else "supervised")
    rank, targets = config.domain.lora_rank, config.domain.lora_targets
    sizes = adapter_matrices(shapes, rank, targets)
    adapter = sum(sizes)

    always = {
        "frozen base, " + ("NF4 layers" if precision.nf4 else "not quantised"): frozen_weights(
            shapes, precision
        ),
        "adapter, float32": 4 * adapter,
        "gradients, float32": 4 * adapter,
        f"optimizer states ({section.optimizer})": optimizer_states(section.optimizer, sizes),
    }
    from liteguard.training.lora_linear import KEPT_BYTES

    unpacked = shapes.linear_parameters * precision.compute
    if precision.nf4 and not precision.cuda and unpacked <= KEPT_BYTES:
        always["matrices kept unpacked"] = unpacked
    if preference:
        always["reference adapter, float32"] = 4 * adapter

    # TRL switches dropout off for DPO.
    per_layer = tokens * layer_activations(
        shapes,
        precision,
        rank,
        targets,
        lora_dropout=0.0 if preference else config.domain.lora_dropout,
        dropout=not preference,
    )
    stream = stream_bytes(shapes, precision)
    norm_input = 4 if precision.casts or not shapes.layer_norm else precision.compute
    ends = tokens * (norm_input * shapes.hidden + 2 * precision.compute * shapes.rotary_width)
    # Autocast keeps 16-bit copies of the adapter until the forward pass ends, and longer where
    # autograd saved them.
    cast = {"adapter in the compute dtype (autocast)": precision.compute * adapter}
    cast = cast if precision.mixed else {}
    work_per_token, work_fixed = layer_work(shapes, precision)
    work = tokens * work_per_token + work_fixed
    logits = head_bytes(shapes, precision, head, tokens, supervised)
    logit_name = {
        "supervised": f"logits of {supervised} supervised tokens",
        "tiled": "logits in tiles, gradient of hidden states",
        "all": f"logits of all {tokens} tokens",
    }[head]
    if section.gradient_checkpointing:
        kept = {
            "input of every layer (checkpointing)": shapes.layers * tokens * stream * shapes.hidden
        }
        # The recomputed layer's first norm keeps its input, which is kept already if no cast is
        # between them.
        shared = stream * shapes.hidden if norm_input == stream else 0
        backward = {**kept, "activations of one layer, recomputed": per_layer - tokens * shared}
    else:
        kept = {f"activations of {shapes.layers} layers": shapes.layers * per_layer, **cast}
        backward = dict(kept)
        cast = {}
    kept = {**kept, **cast, "final norm, rotary tables": ends}
    phases = {
        "loss": {**kept, logit_name: logits},
        "backward": {**backward, "gradients of activations, NF4 matrix": work},
        "optimizer step": {
            "temporaries": 4
            * (adapter if precision.cuda and "8bit" not in section.optimizer else max(sizes))
        },
    }
    if preference and not config.safety.precompute_reference:
        phases["reference pass"] = {
            **kept,
            "hidden states of the policy": tokens * stream * shapes.hidden,
            "one layer of the reference, nothing saved": work,
            logit_name: logits,
        }
    return MemoryEstimate(
        title=(
            f"{architecture.model_type} {shapes.hidden} x {shapes.layers}, {stage_name}: "
            f"{tokens} tokens a micro-batch, {supervised} supervised, LoRA r={rank} "
            f"({adapter:,} parameters), {section.optimizer}, checkpointing "
            f"{'on' if section.gradient_checkpointing else 'off'}, {device} "
            f"{str(dtype).removeprefix('torch.')}"
        ),
        always=always,
        phases=phases,
        cuda=precision.cuda,
        settings={"stage": stage_name, "batch_size": section.batch_size, "tokens": tokens},
    )


# Resident memory of Python, torch and the training libraries before a model is loaded (bytes):
# 0.36 GB of its own and the pages of their files.
LIBRARIES = 550_000_000
# What the allocator keeps of blocks that were freed while a stage trained, as a share of the frozen
# base: between 0.4 and 1.0 for Phi-2 in NF4 (docs/experiments.md, "Memory at Phi-2's size").
KEPT_BY_ALLOCATOR = 0.75


@dataclass(frozen=True)
class HostMemory:
    """Resident memory of a training process, by time (bytes); `mapped` are pages of weight files.

    The kernel drops mapped pages when memory is short, so a process needs less than it shows.
    """

    loading: int
    training: int
    scoring: int  # the adapter on the 16-bit base, at the end
    mapped: int

    @property
    def peak(self) -> int:
        """What the process shows at most."""
        return max(self.loading, self.training, self.scoring)

    @property
    def needed(self) -> int:
        """What must be free; the last scores are left out where they do not fit."""
        return max(self.loading - self.mapped, self.training)

    def __str__(self) -> str:
        return (
            f"{self.peak / 1e9:.1f} GB of the machine's memory (loading {self.loading / 1e9:.1f}, "
            f"training {self.training / 1e9:.1f}, scoring on the 16-bit base "
            f"{self.scoring / 1e9:.1f}); {self.needed / 1e9:.1f} GB must be free"
        )


def host_memory(estimate: MemoryEstimate, parameters: int) -> HostMemory:
    """What a training stage takes of the machine's memory, loading and last scores included.

    estimate: of the stage, on its device. parameters: of the base model, stored in 16 bit.
    Loading: the weight files' pages beside what has been made of them. Scoring: 16-bit weights,
    whose merged layers are copies beside the file's pages, or float32 ones for a small model.
    """
    from liteguard import merged

    file = 2 * parameters
    base = next(size for name, size in estimate.always.items() if name.startswith("frozen base"))
    scoring = merged.measuring_memory(parameters, 0, 0) + file
    if estimate.cuda:
        return HostMemory(LIBRARIES + file, LIBRARIES, scoring, file)
    kept = round(KEPT_BY_ALLOCATOR * base)
    return HostMemory(
        loading=LIBRARIES + file + base,
        training=LIBRARIES + kept + estimate.total,
        scoring=scoring + kept,
        mapped=file,
    )


def stage_disk(section: TrainSection, estimate: MemoryEstimate) -> float:
    """Bytes that a stage writes at most: a trainer's checkpoint holds the adapter and the
    optimizer's states, the finished stage the adapter. estimate: of the stage."""
    adapter = estimate.always["adapter, float32"]
    states = next(size for name, size in estimate.always.items() if name.startswith("optimizer"))
    return (section.save_total_limit + 1) * (adapter + states) + 2 * adapter


# Memory of common cards in GiB, and the least that each size is sold as.
CARDS = {
    8: "8 GB (RTX 4060)",
    12: "12 GB (RTX 4070)",
    16: "16 GB (RTX 4080)",
    24: "24 GB (RTX 4090, L4)",
    32: "32 GB (RTX 5090)",
    48: "48 GB (L40S)",
    80: "80 GB (A100, H100)",
    141: "141 GB (H200)",
}
# The driver's context and what fragmentation leaves unused, in bytes.
BESIDE = 800_000_000


def card_for(config: Config, stage_name: str, architecture: Any) -> tuple[int, str | None]:
    """(bytes that a stage takes of a GPU at the settings' longest rows, the smallest card for it).

    Margin and the driver's context are in it. None: no single card of `CARDS` is enough.
    """
    import torch

    found = estimate(config, stage_name, architecture, device="cuda", dtype=torch.bfloat16)
    needed = found.total + found.margin + BESIDE
    return needed, next((name for size, name in CARDS.items() if needed <= size * 2**30), None)


def advice(config: Config, stage_name: str) -> str:
    """Settings of a stage that still lower its peak, the most effective first."""
    section = getattr(config, stage_name)
    found = []
    if not section.gradient_checkpointing:
        found.append(f"{stage_name}.gradient_checkpointing=true")
    if (section.quantization or config.model.quantization) != "nf4":
        found.append("model.quantization=nf4")
    found.append(f"a {stage_name}.max_length below {section.max_length}")
    if "8bit" not in section.optimizer:
        found.append(f"{stage_name}.optimizer=paged_adamw_8bit")
    return ", ".join(found)


def explain(config: Config, stage_name: str, architecture: Any) -> str:
    """The estimate at micro-batch 1 and the settings to change, for an out-of-memory message."""
    section = getattr(config, stage_name).model_copy(update={"batch_size": 1})
    at_one = config.model_copy(update={stage_name: section})
    try:
        table = estimate(at_one, stage_name, architecture).table()
    except UserError as error:
        table = str(error)
    return f"{table}\nSettings that lower the peak: {advice(config, stage_name)}."
