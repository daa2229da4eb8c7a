"""`launch`, the last line of every recipe: an error before the work begins is one message.

Imports nothing heavy, since a recipe imports it before its arguments are read.
"""

import gc
import importlib.util
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from codexhf.cards import CardError
from codexhf.checkpoints import DISK_FULL
from codexhf.refusals import refuse

LAST_S = 5.0
"""Seconds for which a process that lost another stays, so that the launcher sees that one first."""
PREEMPTED = 75  # EX_TEMPFAIL: start the same command again

_RESUMES = "Mend it and start the same command again: it goes on, or says what has changed."
_FEWER_ROWS = (
    "Hold fewer rows in memory at once. A stage that trains: set auto_find_batch_size: true, which "
    "finds how many fit, or halve per_device_train_batch_size and double "
    "gradient_accumulation_steps, which is the same batch, or set gradient_checkpointing: true. "
    "PPO's rollouts: halve local_rollout_forward_batch_size. A stage that only samples: halve "
    "batch_size. With --allow_changed and the names of what you change, separated by commas, "
    "it goes on from its last checkpoint."
)

launched = False
"""Whether this process is a recipe's own."""
begun = False
"""Whether a stage of this process has begun its work; run.py says so."""


def rank() -> int:
    """The number of this process among those that were launched together."""
    return int(os.environ.get("RANK", "0"))


def processes() -> int:
    """How many processes were launched together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def importing() -> Iterator[None]:
    """Import libraries without garbage collections, a fifth of the time, which find nothing there.

    What was imported stays to the end, so that in a recipe's own process later collections need not
    look at it either. Elsewhere that would also keep what others left behind.
    """
    gc.disable()
    try:
        yield
    finally:
        if launched:
            gc.freeze()
        gc.enable()


def launch(main: Callable[[], object]) -> None:
    """Run a recipe's main; whatever fails before the work begins is one message and exit code 2.

    Set CODEXHF_DEBUG=1 to see the traceback instead. From the beginning of the work on errors keep
    their traceback, but for a stream that cannot be read on. One of several processes then leaves
    at once, and its launcher ends the others.
    A full disk, SIGTERM and SIGHUP end in 75: nothing is wrong with the command.
    """
    global launched
    launched = True
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # under nohup one is ignored
            signal.signal(number, _stop)
    try:
        main()
    except Exception as error:
        if _is_memory_full(error) and not os.environ.get("CODEXHF_DEBUG"):
            said, _, _ = str(error).rpartition("DefaultCPUAllocator: ")[2].partition(". ")
            print(f"stopped: {said}.\n{_FEWER_ROWS}", file=sys.stderr, flush=True)
            if processes() > 1:
                os._exit(1)
            raise SystemExit(2) from None
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            where = f": {error.filename}" if error.filename else ""
            print(f"stopped: {error.strerror}{where}", file=sys.stderr)
            raise SystemExit(PREEMPTED) from None
        if begun or os.environ.get("CODEXHF_DEBUG"):
            if processes() > 1:
                _leave(error)
            if isinstance(error, CardError) and not os.environ.get("CODEXHF_DEBUG"):
                print(f"stopped: {error}\n{_RESUMES}", file=sys.stderr)
                raise SystemExit(2) from None
            raise
        told, text = isinstance(error, ValueError | OSError), str(error)  # written for the user
        if not told:
            text = f"{type(error).__name__}: {error} (CODEXHF_DEBUG=1 shows where.)"
        _, *several = text.split("\n- ")  # PPOTrainer's list
        refuse(several or [text], Path(sys.argv[0]).name, everywhere=not told)
    except KeyboardInterrupt:
        if rank() == 0:
            print("interrupted; start the same command again, it resumes from the last checkpoint")
        raise SystemExit(130) from None
    finally:
        launched = False
        torch = sys.modules.get("torch")
        if torch and torch.distributed.is_initialized():  # else its threads abort the process
            torch.distributed.destroy_process_group()


def _is_memory_full(error: Exception) -> bool:
    """Return whether torch found no memory: on a GPU, or on a CPU, where its error has no name."""
    return type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)


def _leave(error: Exception) -> None:
    """End this process, which others wait for; taking leave of them could take for ever."""
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    if isinstance(error, DistError) or "gloo" in str(error):
        print(f"process {rank()} lost another one: {error}", file=sys.stderr, flush=True)
        time.sleep(LAST_S)
    else:
        print(f"process {rank()} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        get_error_handler().record_exception(error)  # torchrun ends with the earliest of these
    os._exit(1)


def launch_errors() -> list[str]:
    """Return what is wrong with the way in which accelerate was told to shard."""
    told = {name: value.lower() for name, value in os.environ.items()}
    errors = []
    if told.get("ACCELERATE_USE_FSDP") == "true":
        if told.get("FSDP_VERSION", "1") != "2":
            errors.append(
                f"fsdp_version: got {told.get('FSDP_VERSION', '1')}, expected 2. Use "
                "recipes/accelerate/fsdp2.yaml."
            )
        if told.get("FSDP_CPU_RAM_EFFICIENT_LOADING") == "true":
            errors.append(
                "fsdp_cpu_ram_efficient_loading: got true, expected false. It gives weights to the "
                "first process alone, and models that only score are read by each."
            )
    zero = told.get("ACCELERATE_USE_DEEPSPEED") == "true"
    if zero and importlib.util.find_spec("deepspeed") is None:
        errors.append(
            "accelerate: got DeepSpeed, but the package is not installed. Install it with `pip "
            "install deepspeed`, or use recipes/accelerate/fsdp2.yaml."
        )
    return errors


def batch_size_errors(config: Any) -> Iterator[str]:
    """Say why auto_find_batch_size cannot keep its word, where it was given."""
    if config.n_gpu > 1:
        yield (
            f"auto_find_batch_size: got true with {config.n_gpu} GPUs in one process, expected one "
            "process for each. Use accelerate launch, or set CUDA_VISIBLE_DEVICES to one of them."
        )
    if config.dataloader_drop_last:
        yield (
            "auto_find_batch_size: got true with dataloader_drop_last, expected one of them: how "
            "many rows an epoch drops would depend on what fits."
        )


def disable_zero3_init() -> None:
    """Have models loaded whole under ZeRO-3, until training splits those that it trains.

    With training arguments in memory transformers splits every model that it loads, those too that
    only score, whose parts nothing would put together.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()


def _stop(number: int, frame: object) -> None:
    """Where no checkpoint is to be saved, outside training, leave at once."""
    print(f"stopped by {signal.Signals(number).name}; start the same command again", flush=True)
    raise SystemExit(PREEMPTED)
