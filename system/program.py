"""What goes wrong becomes one line and an exit code; a signal stops a run without loss."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from system.errors import InputError

SIGNALS = (signal.SIGINT, signal.SIGTERM)
KEPT = "what was finished is kept, the same command continues, without --restart"
# No repetition mends these.
AMISS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
LOST_CONNECTION = re.compile("[Cc]onnection|Broken pipe|Socket closed|NCCL|Timed out")


class Stopped(KeyboardInterrupt):
    """A signal asked the run to stop; args[0] is its number."""


def program(work: Callable[[], None]) -> None:
    """Calls work(). Exit code 1 after an error, 128 + its number after a signal."""
    try:
        for number in SIGNALS:
            signal.signal(number, stop)
        work()
    except InputError as error:
        sys.exit(f"error: {error}")
    except AMISS as error:
        sys.exit(f"error: {error}; put this right, or begin again with --restart")
    except (OSError, SafetensorError) as error:
        sys.exit(f"error: {error}; put this right: {KEPT}")
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
        sys.exit(
            f"error: {reason}; lower --micro-tokens, --leaves or --episodes, or take "
            "--checkpointing true; what was finished is kept, a run may continue with these"
        )
    except RuntimeError as error:
        if not dist.is_initialized() or not LOST_CONNECTION.search(str(error)):
            raise
        reason = str(error).splitlines()[0][:200]
        sys.exit(
            f"error: another rank is gone, or the connection to it ({reason}); unless it named an "
            f"error of its own, {KEPT}"
        )
    except Stopped as asked:
        print(f"stopped; {KEPT}", file=sys.stderr)
        sys.exit(128 + asked.args[0])


def stop(number: int, frame) -> None:
    exit_soon(number)
    raise Stopped(number)


def exit_soon(number: int) -> None:
    """Ends the process in 25 s at most: schedulers kill 30 s after their first signal."""
    timer = threading.Timer(25, os._exit, (128 + number,))
    timer.daemon = True
    timer.start()


class PostponedSignal:
    """Inside, Ctrl-C and SIGTERM only leave their number here, for the end of an update.

    A second one leaves at once, unless it comes within a second: torchrun passes a scheduler's
    signal on, so each process gets it twice.
    """

    number = 0

    def __enter__(self) -> PostponedSignal:
        self.usual = {number: signal.signal(number, self._postpone) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.usual.items():
            signal.signal(number, handler)

    def _postpone(self, number: int, frame) -> None:
        if not self.number:
            self.number, self.since = number, time.monotonic()
            exit_soon(number)
        elif time.monotonic() - self.since > 1:
            stop(number, frame)
