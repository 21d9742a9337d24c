"""More than one process: who writes, who waits, and which device is whose.

The training scripts run unchanged under `accelerate launch`, which starts a copy of the script per
device and tells each its place by environment variables. Every process reads data and trains; only
the main one writes files, prints and reports. With one process everything here is a no-op.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from liteguard.errors import UserError, WorkError

if TYPE_CHECKING:
    from pathlib import Path

# How long processes wait for the main one. The default (10 minutes between GPUs, 30 between CPUs)
# would end a run whose reference or teacher takes longer. A main process that dies ends them too:
# the launcher sees to that.
PATIENCE = timedelta(days=1)


def world_size() -> int:
    """Number of processes of this run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process among all, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this process is the one that writes files and prints."""
    return rank() == 0


def uses_fsdp() -> bool:
    """Whether `accelerate launch` was given an FSDP configuration."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1")


def keep_adapters_under_fsdp() -> None:
    """Let PEFT save and load the adapter of a model that FSDP has wrapped.

    FSDP adds a part to the names of modules that the gathered state dict does not have. PEFT 0.21
    compares the two: it finds no tensor to save, so that checkpoints and the final adapter are
    empty, and loads a checkpoint into nothing, so that a resumed run starts from its first step's
    adapter. Neither raises an error. Here names are compared without that part, and a checkpoint
    that does not fill every matrix of the adapter is an error.
    """
    import peft
    from peft.tuners import tuners_utils

    original = tuners_utils._get_tuner_state_dict_key_prefixes
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def prefixes(*args: Any, **kwargs: Any) -> set[str]:
        found = original(*args, **kwargs)
        return found | {name.replace("_fsdp_wrapped_module.", "") for name in found}

    def load(model: Any, state_dict: dict[str, Any], adapter_name: str = "default") -> Any:
        own = {
            re.sub(r"(\.lora_[AB])\.weight$", rf"\1.{adapter_name}.weight", name): tensor
            for name, tensor in state_dict.items()
        }
        result = model.load_state_dict(own, strict=False)
        missing = [
            name
            for name in result.missing_keys
            if re.search(rf"\.lora_[AB]\.{adapter_name}\.", name)
        ]
        if missing or result.unexpected_keys:
            raise WorkError(
                f"the checkpoint does not fit the adapter: {len(missing)} matrices are not in it, "
                f"{len(result.unexpected_keys)} of it are unknown ({missing[:2]}, "
                f"{result.unexpected_keys[:2]})."
            )
        return result

    tuners_utils._get_tuner_state_dict_key_prefixes = prefixes
    peft.utils.other.fsdp_auto_wrap_policy = _wrap_every_matrix(
        peft.utils.other.fsdp_auto_wrap_policy
    )
    peft.set_peft_model_state_dict = load  # accelerate takes it from there


def _wrap_every_matrix(original: Callable[..., Any]) -> Callable[..., Any]:
    """PEFT's policy of what is a unit of its own, with the frozen matrices of DPO's reference, too.

    They are float32 beside a 16-bit base, and a unit has one type.
    """

    @functools.wraps(original)
    def policy(model: Any) -> Any:
        from peft.tuners.lora import LoraLayer
        from torch.distributed.fsdp.wrap import _or_policy, lambda_auto_wrap_policy

        layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
        own = {id(m) for each in layers for m in (*each.lora_A.values(), *each.lora_B.values())}
        matrices = functools.partial(lambda_auto_wrap_policy, lambda_fn=lambda m: id(m) in own)
        return functools.partial(_or_policy, policies=[original(model), matrices])

    return policy


def keep_precision_under_fsdp(plugin: Any) -> None:
    """Let FSDP compute in 16 bits, but neither round what a model counts with nor sum in them.

    plugin: accelerate's. By default it rounds the model's buffers too: rotary frequencies of 8 bits
    turn a token at position 2,047 by up to 0.4 (Phi) or 0.9 radians (Llama, heads of 64) too far or
    too little, for an adapter that will be merged into a model which does not. The sum of gradients
    over processes stays float32 as the adapter is. A quantized base sets the policy again when the
    model is wrapped.
    """
    import torch

    original = plugin.set_mixed_precision

    def keep() -> None:
        if plugin.mixed_precision_policy is not None:
            plugin.mixed_precision_policy.buffer_dtype = torch.float32
            plugin.mixed_precision_policy.reduce_dtype = torch.float32

    def set_mixed_precision(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        keep()

    keep()
    plugin.set_mixed_precision = set_mixed_precision


def local_device() -> Any:
    """The device of this process, as `device_map` takes it: a GPU's index, or cpu."""
    import torch

    return int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.is_available() else "cpu"


def connect() -> None:
    """Let the processes find each other; called before the first thing they do in turn."""
    if world_size() > 1:
        import torch
        from accelerate import PartialState

        PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)


def leave() -> None:
    """Leave the others at the end of a script that went well.

    Gloo's threads that outlive the interpreter end in abort() on a busy machine, and the launcher
    would report a finished run as failed.
    """
    if world_size() > 1:
        import torch

        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def barrier() -> None:
    """Wait until every process is here."""
    if world_size() > 1:
        import torch

        connect()
        torch.distributed.barrier()


def on_main(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)`, run by the main process only; every process gets its result.

    An exception of the main process is raised in all of them, so that none is left waiting.
    """
    if world_size() == 1:
        return function(*args)
    import torch

    connect()
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome[0] = function(*args)
        except Exception as error:
            outcome[1] = error
    torch.distributed.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def write_once(path: Path, function: Callable[..., Any], *args: Any) -> None:
    """`function(*args)`, which writes `path`, run by the main process if there is no such file.

    Only the main process looks: another one may look when the file is just written, and then not
    wait with the others for the result, but join them in the wrong one.
    """

    def unless_there() -> None:
        if not path.exists():
            function(*args)

    on_main(unless_there)


def main_first(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that fills a cache: the main process runs it alone, then the others, who find it
    filled. An exception of the main process is raised in all of them."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if world_size() == 1:
            return function(*args, **kwargs)
        result = None

        def first() -> None:
            nonlocal result
            result = function(*args, **kwargs)

        on_main(first)
        return result if is_main() else function(*args, **kwargs)

    return run


def accumulation(gradient_accumulation: int, stage_name: str) -> int:
    """Accumulation of one process, so that all together have the configured effective batch.

    Raises UserError where the number of processes does not divide it.
    """
    processes = world_size()
    if gradient_accumulation % processes:
        allowed = [n for n in range(1, gradient_accumulation + 1) if gradient_accumulation % n == 0]
        raise UserError(
            f"{stage_name}.gradient_accumulation = {gradient_accumulation} cannot be shared by "
            f"{processes} processes; the effective batch would change.\n"
            f"Start {' or '.join(map(str, allowed))} processes (accelerate launch --num_processes) "
            f"or set --set {stage_name}.gradient_accumulation to a multiple of {processes}."
        )
    return gradient_accumulation // processes


def quiet_unless_main() -> None:
    """Only the main process prints; the others keep their standard error."""
    if not is_main():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115
