"""torchrun as the recipes start it: without messages of its own, since its ranks have reported everything.

    python -m scripts.torchrun --nproc_per_node 2 train_sft_vlm.py      # takes the flags of torchrun

After Ctrl-C torchrun prints a traceback of 40 lines below the message of the training; if a rank fails, it adds its own
traceback to that of the rank. It gives the ranks 30 seconds to finish their step and save; here they have 10 minutes.
Two runs on one machine would use the same port; here each gets a free one.
"""

if __spec__ is None:  # started by its path: Python would not find the other folders
    raise SystemExit("type -m scripts.torchrun instead of scripts/torchrun.py")

from common.start import begin

if __name__ == "__main__":
    begin()  # from here on Ctrl-C or a missing package prints one line, not a traceback

import logging
import os
import re
import sys

from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun


def main():
    logging.disable(logging.ERROR)
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    if not any(re.match("--?(nnodes|node|master|rdzv|standalone)", flag) for flag in sys.argv):
        sys.argv.insert(1, "--standalone")  # uses a free port, in case another run has the usual one
    try:
        torchrun()
    except SignalException:
        sys.exit(130)
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
        if status < 0:  # killed by a signal: end by the same signal, for the process that started this one
            os.kill(os.getpid(), -status)
        sys.exit(status)


if __name__ == "__main__":
    main()
