"""torchrun, with an exit code that says whether to start again.

    python -m megarl.launch TORCHRUN_OPTIONS -m megarl.train RECIPE

torchrun reports 1 for whatever its ranks end with, also where they were told to stop, have saved, and left with 75
(`megarl.train.EXIT_REQUEUE`). Here that is 75 too. Signals that mean "save and stop" go to the ranks, SIGUSR1 among
them, which torchrun would die of by default.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
SAVED = "MEGARL_SAVED"  # names a file that ranks make when they leave with 75


def main(argv: list[str]) -> int:
    """Run the ranks of this machine; the exit code."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    from megarl.train import EXIT_REQUEUE

    # A rank with another parent knows that this process died before it could ask the kernel to be told.
    os.environ["MEGARL_LAUNCHER"] = str(os.getpid())
    with tempfile.TemporaryDirectory(prefix="megarl-launch-") as folder:
        saved = Path(folder) / "saved"
        os.environ[SAVED] = str(saved)
        try:
            run(parse_args([f"--signals-to-handle={SIGNALS}", *argv]))
        except (ChildFailedError, SignalException) as ended:
            if saved.exists():
                return EXIT_REQUEUE
            print(ended, file=sys.stderr)
            return 1
        # Ranks that leave as they are told by a signal to torchrun are no failure to it.
        return EXIT_REQUEUE if saved.exists() else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
