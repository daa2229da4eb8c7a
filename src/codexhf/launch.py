"""`launch`, the last line of every recipe: an error before the work begins is one message.

Imports nothing heavy, since a recipe imports it before its arguments are read.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from codexhf.checkpoints import DISK_FULL
from codexhf.refusals import refuse

PREEMPTED = 75  # EX_TEMPFAIL: start the same command again

begun = False
"""Whether a stage of this process has begun its work; run.py says so."""


def launch(main: Callable[[], object]) -> None:
    """Run a recipe's main; whatever fails before the work begins is one message and exit code 2.

    Set CODEXHF_DEBUG=1 to see the traceback instead. From the beginning of the work on errors keep
    their traceback. A full disk, SIGTERM and SIGHUP end in 75: nothing is wrong with the command.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # under nohup one is ignored
            signal.signal(number, _stop)
    try:
        main()
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            print(f"stopped: {error.strerror or error}", file=sys.stderr)
            raise SystemExit(PREEMPTED) from None
        if begun or os.environ.get("CODEXHF_DEBUG"):
            raise
        told = isinstance(error, ValueError | OSError)  # a sentence written for the user
        text = str(error) if told else f"{type(error).__name__}: {error}"
        text += "" if told else " (CODEXHF_DEBUG=1 shows where.)"
        refuse([text], Path(sys.argv[0]).name, everywhere=not told)
    except KeyboardInterrupt:
        if int(os.environ.get("RANK", "0")) == 0:
            print("interrupted; start the same command again, it resumes from the last checkpoint")
        raise SystemExit(130) from None
    finally:
        torch = sys.modules.get("torch")
        if torch and torch.distributed.is_initialized():  # else its threads abort the process
            torch.distributed.destroy_process_group()


def _stop(number: int, frame: object) -> None:
    """Where no checkpoint is to be saved, outside training, leave at once."""
    print(f"stopped by {signal.Signals(number).name}; start the same command again", flush=True)
    raise SystemExit(PREEMPTED)
