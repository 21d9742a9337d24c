"""Peak training memory by term, from the base model's shapes; and the way down when it runs out.

    python -m liteguard.memory                       # Phi-1.5 and Phi-2 at 1 x 2048 tokens
    python -m liteguard.memory --config configs/phi-2_8gb.yaml --set model.path=DIR   # every term

Nothing is loaded: parameters are counted on torch's meta device. Which tensors autograd keeps was
read off the code paths that the trainers run (transformers' Phi and Llama, PEFT's LoRA layers,
bitsandbytes' Linear4bit) and is compared with measurement in tests/test_memory.py, with CUDA's
autocast rules reproduced on the CPU. The way of accounting is that of Korthikanti et al. 2022,
"Reducing Activation Recomputation in Large Transformer Models", section 4.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from liteguard import cli, models
from liteguard.config import CONFIG_DIR, Config, build, read_yaml
from liteguard.errors import UserError, WorkError

if TYPE_CHECKING:
    import torch

Head = Literal["supervised", "tiled", "all"]

# bitsandbytes NF4 with double quantisation: an 8-bit scale per 64 weights, and a float32 scale per
# 256 of those (Dettmers et al. 2023, QLoRA, section 3: 0.127 bits per parameter).
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
# Two code books and an offset per quantised matrix.
NF4_TABLES = 16 * 4 + 256 * 4 + 4
# bitsandbytes' 8-bit AdamW: float32 scale and minimum per 256 values (Dettmers et al. 2022, "8-bit
# Optimizers via Block-wise Quantization"); tensors below 4096 values keep float32 states.
BLOCK_8BIT, MIN_8BIT = 256, 4096
# The tile of TRL's fused head (trl/kernels/chunked_logprob.py): tokens x vocabulary rows.
TILE_TOKENS, TILE_VOCABULARY = 4096, 32768
CUBLAS_WORKSPACE = 32 * 2**20
UNMODELLED_SHARE = 0.05


@dataclass(frozen=True)
class Shapes:
    """What the formulas need to know of an architecture; sizes in elements."""

    hidden: int
    ffn: int
    heads: int
    q_width: int
    kv_width: int
    layers: int
    vocabulary: int
    rotary_width: int
    layer_norm: bool  # else RMS norm
    norms: int  # per layer; 1 where attention and FFN run in parallel on one norm's output
    gated: bool
    activation: str
    residual_dropout: bool
    partial_rotary: bool
    linear: list[tuple[str, int, int]]  # (name, in, out) of every linear layer in the decoder
    other_parameters: int  # embeddings, head, norms, biases

    @property
    def linear_parameters(self) -> int:
        return sum(n_in * n_out for _, n_in, n_out in self.linear)


def meta_model(architecture: Any) -> Any:
    """The causal language model of a transformers config on the meta device: shapes, no data."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(architecture)


def read_shapes(architecture: Any) -> Shapes:
    """Shapes of a model with one attention and one feed-forward block per layer.

    Raises UserError for an architecture whose layers have other parts.
    """
    import torch

    model = meta_model(architecture)
    config = architecture.get_text_config()
    linear = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".layers." in f".{name}":
            linear.append((name.rsplit(".", 1)[-1], module.in_features, module.out_features))
    layers = config.num_hidden_layers
    first = {name: (n_in, n_out) for name, n_in, n_out in linear[: len(linear) // max(layers, 1)]}
    gated = {"gate_proj", "up_proj", "down_proj"} <= first.keys()
    plain = {"fc1", "fc2"} <= first.keys()
    if not ({"q_proj", "k_proj", "v_proj"} <= first.keys() and (gated or plain)):
        raise UserError(
            f"No memory formula for the {architecture.model_type!r} architecture, whose layers "
            f"hold {', '.join(first) or 'no linear layers'}. Known: q_proj, k_proj, v_proj with "
            "gate_proj, up_proj, down_proj (Llama family) or with fc1, fc2 (Phi)."
        )
    block = model.get_submodule(next(n for n, m in model.named_modules() if n.endswith("layers.0")))
    norms = [m for n, m in block.named_children() if "norm" in n]
    rope = getattr(config, "rope_parameters", None) or {}
    partial = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0))
    head_width = first["q_proj"][1] // config.num_attention_heads
    total = sum(p.numel() for p in model.parameters())
    return Shapes(
        hidden=config.hidden_size,
        ffn=first["gate_proj" if gated else "fc1"][1],
        heads=config.num_attention_heads,
        q_width=first["q_proj"][1],
        kv_width=first["k_proj"][1],
        layers=layers,
        vocabulary=config.vocab_size,
        rotary_width=int(head_width * partial),
        layer_norm=all(isinstance(m, torch.nn.LayerNorm) for m in norms),
        norms=len(norms),
        gated=gated,
        activation=config.hidden_act,
        residual_dropout=getattr(config, "resid_pdrop", 0.0) > 0,
        partial_rotary=partial < 1,
        linear=linear,
        other_parameters=total - sum(n_in * n_out for _, n_in, n_out in linear),
    )


@dataclass(frozen=True)
class Precision:
    """Storage and arithmetic: bytes of the compute dtype, and what autocast does to the rest."""

    compute: int  # bytes per element
    nf4: bool
    cuda: bool

    @property
    def mixed(self) -> bool:
        """16-bit arithmetic: the float32 adapter runs under autocast."""
        return self.compute == 2

    @property
    def casts(self) -> bool:
        """CUDA's autocast runs norms and powers in float32; the CPU's does not."""
        return self.mixed and self.cuda


def frozen_weights(shapes: Shapes, precision: Precision) -> int:
    """Bytes of the base model: NF4 or compute dtype in the layers, compute dtype elsewhere."""
    other = shapes.other_parameters * precision.compute
    if not precision.nf4:
        return other + shapes.linear_parameters * precision.compute
    stored = shapes.linear_parameters * NF4_BITS / 8 + NF4_TABLES * len(shapes.linear)
    return other + round(stored)


def adapter_matrices(shapes: Shapes, rank: int, targets: list[str] | str) -> list[int]:
    """Elements of every LoRA matrix: rank x in and out x rank per target."""
    sizes = []
    for name, n_in, n_out in shapes.linear:
        if targets == "all" or name in targets:
            sizes += [rank * n_in, rank * n_out]
    return sizes


def optimizer_states(optimizer: str, sizes: list[int]) -> int:
    """Bytes of AdamW's two moments for matrices of these sizes (elements).

    float32: 8 bytes a parameter. 8-bit: 2 bytes and two float32 scales per 256 values. Paged states
    have the same size: they may move to the host's memory when the card is full.
    """
    if "8bit" not in optimizer:
        return 8 * sum(sizes)
    total = 0
    for size in sizes:
        if size < MIN_8BIT:
            total += 8 * size
        else:
            total += 2 * size + 2 * 4 * math.ceil(size / BLOCK_8BIT)
    return total


def layer_activations(
    shapes: Shapes,
    precision: Precision,
    rank: int,
    targets: list[str] | str = "all",
    lora_dropout: float = 0.0,
    dropout: bool = True,
) -> int:
    """Bytes per token that autograd saves for the backward pass of one decoder layer.

    Attention is a fused kernel (flash, memory-efficient): q, k, v, output and one float32 log-sum
    per head, never the scores. A frozen weight needs no input for its gradient; a LoRA matrix does,
    so each LoRA layer keeps its input and its rank-wide middle. Under 16-bit autocast that input is
    a cast copy of its own, per LoRA layer, unless it already has the compute dtype.
    """
    c, f, h = precision.compute, shapes.ffn, shapes.hidden
    lora = Counter(
        name
        for name, _, _ in shapes.linear[: len(shapes.linear) // shapes.layers]
        if targets == "all" or name in targets
    )
    norm_float32 = precision.casts and shapes.layer_norm
    x = 4 if norm_float32 else c  # bytes of a norm's output
    # PEFT's Linear (16-bit base) always casts to the adapter's float32 first, its Linear4bit does
    # outside CUDA's autocast: autocast then makes a new 16-bit copy for each layer.
    converts = precision.mixed and not (precision.nf4 and precision.cuda)
    own_copy = converts or (precision.mixed and x == 4)

    def inputs(width: int, names: set[str], own: bool, element: int) -> int:
        readers = sum(lora[name] for name in names)
        if lora_dropout > 0:
            mask = 1 if precision.cuda else element
            return readers * width * (c + mask)
        return width * (readers * c if own else min(readers, 1) * element)

    # Norms: LayerNorm keeps its input and two statistics, RMS norm a float32 input and one.
    norm_input = 4 if norm_float32 or not shapes.layer_norm else c
    statistics = 2 * norm_input if shapes.layer_norm else 4
    total = shapes.norms * (norm_input * h + statistics)

    # Attention.
    ffn_first = {"gate_proj", "up_proj"} if shapes.gated else {"fc1"}
    attention_first = {"q_proj", "k_proj", "v_proj"}
    if shapes.norms == 1:
        total += inputs(h, attention_first | ffn_first, own_copy, x)
    else:
        total += inputs(h, attention_first, own_copy, x) + inputs(h, ffn_first, own_copy, x)
    total += c * (2 * shapes.q_width + 2 * shapes.kv_width) + 4 * shapes.heads
    # A partial rotary embedding concatenates, which leaves q (and the kernel's output, which takes
    # q's layout) in head-major order: the projection then reads a copy. Otherwise it reads the
    # kernel's own output.
    if shapes.partial_rotary or converts or lora_dropout > 0:
        total += inputs(shapes.q_width, {"o_proj", "dense"}, converts, c)

    # FFN.
    middle = 4 if precision.nf4 and norm_float32 else c  # bytes of fc1's, gate's and up's output
    if shapes.gated:
        product = middle
        total += 3 * middle * f  # gate, act(gate), up
    elif shapes.activation == "gelu_new":
        # 0.5 x (1 + tanh(a (x + b x^3))) in separate steps: keeps x, tanh, 0.5 x and 1 + tanh.
        product = 4 if precision.casts else c
        total += f * (3 * product + middle)
    else:
        product = middle
        total += middle * f
    last_copy = converts or (precision.mixed and product == 4)
    total += inputs(f, {"down_proj", "fc2"}, last_copy, product)

    total += sum(lora.values()) * rank * c
    if shapes.residual_dropout and dropout:
        # A byte per element on CUDA; the CPU keeps the scaled noise.
        total += h * (2 if precision.cuda else 2 * c)
    return total


def stream_bytes(shapes: Shapes, precision: Precision) -> int:
    """Bytes per element of the residual stream, which checkpointing keeps for every layer.

    With an NF4 base under CUDA's autocast a LayerNorm's float32 output makes bitsandbytes return
    float32, and the sum takes it over: Phi's stream is then float32, a Llama's stays 16-bit.
    """
    if precision.casts and precision.nf4 and shapes.layer_norm:
        return 4
    return precision.compute


def layer_work(shapes: Shapes, precision: Precision) -> tuple[int, int]:
    """(bytes per token, fixed bytes) of one layer's backward beside what it saved.

    Two gradients of the residual stream; one matrix taken out of NF4; and, at the FFN's last layer,
    the gradient of its input: LoRA's part and the base's part, before they are added. What comes
    before in the layer needs no more, because saved tensors are freed as gradients are made.
    """
    c = precision.compute
    if not precision.mixed:
        gradients = c
    elif precision.casts and shapes.layer_norm:
        gradients = c + 8  # both parts in float32, one on its way there
    elif precision.nf4 and precision.cuda:
        gradients = 2 * c
    else:
        gradients = c + 4  # PEFT's conversion to the adapter's float32
    per_token = gradients * shapes.ffn + 2 * stream_bytes(shapes, precision) * shapes.hidden
    largest = max(n_in * n_out for _, n_in, n_out in shapes.linear)
    return per_token, largest * precision.compute if precision.nf4 else 0


def head_bytes(
    shapes: Shapes, precision: Precision, head: Head, tokens: int, supervised: int
) -> int:
    """Bytes of the output head at its peak, logits and their gradient included.

    supervised: float32 logits and their powers in a tile of the vocabulary, for the supervised
    positions (`liteguard/head.py`). tiled: TRL's fused head, which recomputes tiles of the logits
    in the backward pass and accumulates float32 gradients of the hidden states. all: the loss of
    transformers on every position: 16-bit logits, float32 copy, log-softmax, gradient.
    """
    v, c = shapes.vocabulary, precision.compute
    if head == "all":
        return tokens * v * (12 + (2 * c if precision.mixed else 0))
    if head == "supervised":
        # Logits, their difference to the largest, powers; of all supervised rows a copy, the
        # embeddings of the targets, the gradient and its float32 sum.
        from liteguard.head import TILE

        tile = supervised * min(TILE, v) * (8 + (c if precision.mixed else 0))
        row = 3 * stream_bytes(shapes, precision) + 4
        return tile + row * supervised * shapes.hidden
    rows = supervised if precision.cuda else tokens
    tile = min(rows, TILE_TOKENS) * TILE_VOCABULARY
    # Hidden states of the scored rows: a copy, its 16-bit form, the float32 gradient.
    hidden = rows * shapes.hidden * (stream_bytes(shapes, precision) + c + 4)
    return hidden + tile * (c if precision.cuda else c + 4)


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
    from liteguard.lora_linear import KEPT_BYTES

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


def train_within_memory(
    train: Callable[[int, int], Any],
    batch_size: int,
    gradient_accumulation: int,
    explain: Callable[[], str],
) -> tuple[Any, list[dict[str, Any]]]:
    """(what `train` returned, the steps that ran out of memory, for stage.json).

    `train(batch_size, gradient_accumulation)` is called with the given values and, each time it
    raises torch.OutOfMemoryError, again with half the micro-batch and twice the accumulation: the
    effective batch and so the result stay the same. An odd micro-batch of b goes to the largest
    smaller divisor of the effective batch. At micro-batch 1 a WorkError with `explain()`, the
    estimate and the settings to change. `train` has to resume from its last checkpoint.
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
        smaller = next(b for b in range(batch_size // 2, 0, -1) if effective % b == 0)
        print(
            f"out of memory with micro-batch {batch_size} x {gradient_accumulation}: going on from "
            f"the last checkpoint with {smaller} x {effective // smaller} (same effective batch)"
        )
        batch_size, gradient_accumulation = smaller, effective // smaller


def explain(config: Config, stage_name: str, architecture: Any) -> str:
    """The estimate at micro-batch 1 and the settings to change, for an out-of-memory message."""
    section = getattr(config, stage_name).model_copy(update={"batch_size": 1})
    at_one = config.model_copy(update={stage_name: section})
    try:
        table = estimate(at_one, stage_name, architecture).table()
    except UserError as error:
        table = str(error)
    return f"{table}\nSettings that lower the peak: {advice(config, stage_name)}."


def phi_architecture(name: Literal["phi-1_5", "phi-2"]) -> Any:
    """The published config of a Phi model (microsoft/phi-1_5, microsoft/phi-2), shapes only."""
    from transformers import PhiConfig

    shape = {
        "phi-1_5": {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 24,
            "partial_rotary_factor": 0.5,
            "resid_pdrop": 0.0,
        },
        "phi-2": {
            "hidden_size": 2560,
            "intermediate_size": 10240,
            "num_hidden_layers": 32,
            "partial_rotary_factor": 0.4,
            "resid_pdrop": 0.1,
        },
    }[name]
    return PhiConfig(
        vocab_size=51200,
        num_attention_heads=32,
        max_position_embeddings=2048,
        hidden_act="gelu_new",
        **shape,
    )


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", metavar="FILE", help="a YAML; default: both Phi models")
    parser.add_argument(
        "--set", dest="settings", metavar="SECTION.KEY=VALUE", action="append", default=[]
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args()
    dtype = torch.bfloat16 if args.device == "cuda" else None
    if args.config:
        config = cli.resolve_config(args)
        _, _, architecture = models.model_config(config)
        for stage in ("domain", "instruction", "safety"):
            found = estimate(config, stage, architecture, device=args.device, dtype=dtype)
            print(found.table(), end="\n\n")
        return
    print(
        "QLoRA r=32 on all layers, bfloat16 on a GPU, micro-batch 1 x 2048 (preference: a pair of "
        "2048), GB\n"
    )
    print(f"{'model':9}{'stage':13}{'setting':42}{'peak':>7}{'margin':>8}  peak is in")
    for name in ("phi-1_5", "phi-2"):
        for stage, settings, fused, label in summary_rows():
            config = build(
                [
                    (name, read_yaml(CONFIG_DIR / f"{name}.yaml")),
                    ("rows", {stage: {"batch_size": 1, **settings}}),
                ]
            )
            found = estimate(
                config,
                stage,
                phi_architecture(name),
                device=args.device,
                dtype=dtype,
                fused_gelu=fused,
            )
            print(
                f"{name:9}{stage:13}{label:42}{found.total / 1e9:7.2f}{found.margin / 1e9:8.2f}  "
                f"{found.peak_phase}"
            )


def summary_rows() -> list[tuple[str, dict[str, Any], bool, str]]:
    """(stage, its settings, whether GELU is fused, label) of the table without --config."""
    plain, paged = "adamw_torch", "paged_adamw_8bit"
    rows = []
    for stage in ("domain", "instruction", "safety"):
        for checkpointing, optimizer, fused, label in (
            (False, plain, False, "no checkpointing, gelu_new"),
            (False, plain, True, "no checkpointing"),
            (True, plain, False, "checkpointing, gelu_new"),
            (True, plain, True, "checkpointing"),
            (True, paged, True, "checkpointing, 8-bit AdamW"),
        ):
            values = {"gradient_checkpointing": checkpointing, "optimizer": optimizer}
            rows.append((stage, values, fused, label))
            if stage == "safety":
                values = {**values, "precompute_reference": True}
                rows.append((stage, values, fused, f"{label}, precomputed"))
    return rows


if __name__ == "__main__":
    cli.run(main)
