"""A worker's end of the line protocol by which grpo_vs_trl.py lets two trainers take turns.

After each step the worker writes {"seconds": ..., "cpu_seconds": ..., "tokens": ...} to its stdout, and waits for a
line on stdin. Standard library only: both virtual environments import it.
"""

from __future__ import annotations

import json
import os
import sys
import time


class Gate:
    """`pause` ends a step, and returns when the next may begin. Whatever else the process prints goes to stderr."""

    def __init__(self) -> None:
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.start()

    def start(self) -> None:
        self.clocks = time.perf_counter(), time.process_time()

    def pause(self, tokens: int) -> None:
        wall, cpu = self.clocks
        spent = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
        print(json.dumps(spent | {"tokens": tokens}), file=self.answers, flush=True)
        if not sys.stdin.readline():
            sys.exit("the benchmark has gone")
        self.start()
