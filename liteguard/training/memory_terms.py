"""The terms of a stage's memory: weights, activations, the vocabulary head, optimizer states."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from liteguard.errors import UserError
from liteguard.models import meta_model

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
        activation=_activation(config),
        residual_dropout=getattr(config, "resid_pdrop", 0.0) > 0,
        partial_rotary=partial < 1,
        linear=linear,
        other_parameters=total - sum(n_in * n_out for _, n_in, n_out in linear),
    )


def _activation(config: Any) -> str:
    """The name of the FFN's activation, under the names that families give the setting."""
    names = ("hidden_act", "hidden_activation", "activation_function")
    return next((str(v) for name in names if (v := getattr(config, name, None))), "silu")


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
    positions (`training/loss_head.py`). tiled: TRL's fused head, which recomputes tiles of the
    logits in the backward pass and accumulates float32 gradients of the hidden states. all: the
    loss of transformers on every position: 16-bit logits, float32 copy, log-softmax, gradient.
    """
    v, c = shapes.vocabulary, precision.compute
    if head == "all":
        return tokens * v * (12 + (2 * c if precision.mixed else 0))
    if head == "supervised":
        # Logits, their difference to the largest, powers; of all supervised rows a copy, the
        # embeddings of the targets, the gradient and its float32 sum.
        from liteguard.training.loss_head import TILE

        tile = supervised * min(TILE, v) * (8 + (c if precision.mixed else 0))
        row = 3 * stream_bytes(shapes, precision) + 4
        return tile + row * supervised * shapes.hidden
    rows = supervised if precision.cuda else tokens
    tile = min(rows, TILE_TOKENS) * TILE_VOCABULARY
    # Hidden states of the scored rows: a copy, its 16-bit form, the float32 gradient.
    hidden = rows * shapes.hidden * (stream_bytes(shapes, precision) + c + 4)
    return hidden + tile * (c if precision.cuda else c + 4)
