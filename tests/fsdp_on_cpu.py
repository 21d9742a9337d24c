"""A script under FSDP on CPU processes: `accelerate launch ... fsdp_on_cpu.py SCRIPT ARGUMENTS`.

Accelerate turns FSDP on for accelerators only, and PyTorch's first FSDP frees a parameter's storage
when it "moves" it from the CPU to the CPU. Both are put right here, for tests: what is left, the
sharding, the names of wrapped modules and the gathering of what is saved, is as on GPUs.
"""

import contextlib
import runpy
import sys
from pathlib import Path

import torch
import torch.distributed.fsdp._flat_param as flat_param
import torch.distributed.fsdp._init_utils as init_utils
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType


def use_fsdp_on_cpu() -> None:
    original = AcceleratorState.__init__

    def with_plugin(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = with_plugin
    Accelerator.distributed_type = property(lambda self: DistributedType.FSDP)
    init_utils._get_device_from_device_id = lambda *args: torch.device("cpu")
    flat_param.FlatParamHandle.to_cpu = lambda self: contextlib.nullcontext()


if __name__ == "__main__":
    use_fsdp_on_cpu()
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
