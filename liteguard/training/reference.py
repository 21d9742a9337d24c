"""The stage's parent as DPO's reference: the same weights, its log-probabilities computed once."""

from __future__ import annotations

import re
from typing import Any

from liteguard import distributed, writing
from liteguard.errors import WorkError
from liteguard.progress import Progress
from liteguard.training.stage import Run, Stage


def restore_precision(model: Any, stage: Stage) -> None:
    """The trained adapter back in float32, with the parent's exact values.

    TRL 1.16 rounds the adapter of a quantised base to bfloat16, which has 8 significant bits: a
    weight of 0.02 has neighbours 1.2e-4 away, and an AdamW step of 1e-5 rounds back to where it
    was. Most of a stage 2 at Phi's learning rate would be lost without any sign (measured in
    docs/experiments.md), and DPO's policy would start beside its reference, which is copied before
    the rounding. Activations still run in the compute dtype, by autocast.
    """
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if stage.parent is None:
        return
    with torch.no_grad():
        for name, (tensor, policy) in saved_adapter(model, stage, "default").items():
            if policy is None:
                raise WorkError(f"{stage.parent}: {name} has no place in the model.")
            policy.copy_(tensor)


def saved_adapter(model: Any, stage: Stage, adapter: str) -> dict[str, tuple[Any, Any]]:
    """Name in the parent's file -> (saved tensor, the named adapter's parameter or None)."""
    from safetensors.torch import load_file

    assert stage.parent is not None  # stage 1 has no reference
    parameters = dict(model.named_parameters())
    saved = load_file(str(stage.parent / "adapter_model.safetensors"))
    return {
        name: (tensor, parameters.get(re.sub(r"(\.lora_[AB])\.", rf"\1.{adapter}.", name)))
        for name, tensor in saved.items()
    }


def check_reference(model: Any, stage: Stage) -> None:
    """Raise WorkError unless DPO's policy and reference both equal the parent, tensor by tensor.

    With an equal reference the first loss is ln 2 and the first margins are 0; with the raw base
    model as reference nothing would look wrong.
    """
    import torch

    for adapter, role in (("ref", "reference"), ("default", "policy")):
        for name, (tensor, found) in saved_adapter(model, stage, adapter).items():
            if found is None or not torch.equal(found.cpu().float(), tensor.float()):
                raise WorkError(
                    f"DPO's {role} is not the policy in {stage.parent}: {name} differs."
                )
            if adapter == "ref" and found.requires_grad:
                raise WorkError(f"DPO's reference is not frozen: {name} would be trained.")
    digest = stage.inputs["parent"][:16]
    print(f"DPO reference: frozen copy of {stage.parent} (adapter sha256 {digest}...)")


def precompute_reference(stage: Run, trainer: Any) -> None:
    """Compute the reference's log-probabilities once and drop it: one policy is left in memory.

    They are kept in the work directory, so that a resumed run does not compute them again.
    """
    import torch
    from safetensors.torch import load_file, save_file
    from torch.utils.data import DataLoader

    path = stage.work / "reference.safetensors"
    sets = {"train": trainer.train_dataset, "validation": trainer.eval_dataset}

    def compute() -> None:
        trainer.model.eval()
        found = {}
        for name, rows in sets.items():
            batches = DataLoader(
                rows, batch_size=stage.section.batch_size, collate_fn=trainer.data_collator
            )
            scores = []
            progress = Progress(f"reference, {name}", len(batches), unit="batches", quiet=True)
            for batch in batches:
                batch = {key: value.to(trainer.model.device) for key, value in batch.items()}
                scores.append(torch.stack(trainer.compute_ref_log_probs(trainer.model, batch)))
                progress.add()
            progress.close()
            both = torch.cat(scores, dim=1).float().cpu()
            found[f"{name}.chosen"], found[f"{name}.rejected"] = (row.clone() for row in both)
        with writing.replacing(path) as beside:
            save_file(found, str(beside))
        trainer.model.train()

    distributed.write_once(path, compute)
    stored = load_file(str(path))
    with_scores = {
        name: rows.add_column("ref_chosen_logps", stored[f"{name}.chosen"].tolist()).add_column(
            "ref_rejected_logps", stored[f"{name}.rejected"].tolist()
        )
        for name, rows in sets.items()
    }
    trainer.train_dataset, trainer.eval_dataset = with_scores.values()
    trainer.precompute_ref_logps = True
    trainer.accelerator.unwrap_model(trainer.model).delete_adapter("ref")
    print(f"reference: {sum(map(len, sets.values()))} pairs scored once, then dropped from memory")
