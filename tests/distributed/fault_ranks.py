"""What test_faults.py starts under torchrun: two ranks, of which rank 1 fails in the way the argument names."""

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from megarl.observe.timers import Phases
from megarl.parallel.watchdog import Watchdog, die_with_parent

DEADLINE_S = 6.0


def main(fault: str) -> None:
    die_with_parent()
    dist.init_process_group("gloo")
    watchdog = Watchdog(DEADLINE_S)
    phases = Phases(watchdog)
    rank = dist.get_rank()
    print(f"rank {rank} pid {os.getpid()}", flush=True)
    with phases("train"):
        dist.all_reduce(torch.ones(1))
        try:
            if rank == 1:
                fail(fault, phases)
            dist.all_reduce(torch.ones(1))
        except Exception as error:
            watchdog.report_error(error)
            os._exit(1)


def fail(fault: str, phases: Phases) -> None:
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault == "raises":
        raise ValueError("reward of prompt train.jsonl:17 is not a number")
    if fault == "hangs":
        with phases("reward"):
            time.sleep(600)
    if fault == "launcher killed":
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(600)


if __name__ == "__main__":
    main(sys.argv[1])
