"""Lets accelerate shard over processes on a CPU, which it does on accelerators alone.

torchrun --nproc_per_node 2 tests/fsdp_on_cpu.py recipes/sft.py --use_cpu true ...
"""

import os
import runpy
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
}
"""What accelerate launch makes of recipes/accelerate/fsdp2.yaml."""

ZERO3 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto",
    "DS_ACCELERATOR": "cpu",
}
"""And of recipes/accelerate/zero3.yaml."""

_init = AcceleratorState.__init__


def _with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    _init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP


def allow() -> None:
    """Shard from here on, where `SHARDED` is in the environment."""
    AcceleratorState.__init__ = _with_fsdp


def each(work: Callable[[str, Path], None], folder: str, way: str, *names: str) -> None:
    """Do the named pieces of work in folders of their own, and end.

    Args:
        way: ddp; zero3; fsdp2; or pieces, fsdp2 with checkpoints that each process writes part of.
    """
    torch.set_num_threads(1)
    if way == "zero3":
        os.environ.update(ZERO3)
    elif way != "ddp":
        os.environ.update(SHARDED)
        if way == "pieces":
            os.environ["FSDP_STATE_DICT_TYPE"] = "SHARDED_STATE_DICT"
        allow()
    for name in names:
        work(name, Path(folder) / name)
    leave()


def leave() -> None:
    """End this process, one of several, when all are done.

    What torch does at the end of an interpreter aborted (-6) now and then on a busy machine.
    """
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        time.sleep(1)  # a process that leaves first takes its sockets from the other
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    allow()
    os.environ.update(SHARDED)
    sys.argv = sys.argv[1:]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")
