"""Peak training memory by term, from the base model's shapes.

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
from typing import Any, Literal

from liteguard import cli, models
from liteguard.config import CONFIG_DIR, build, read_yaml
from liteguard.training.memory_estimate import estimate


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
