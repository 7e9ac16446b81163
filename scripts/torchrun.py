"""torchrun as the recipes start it: it ends without words of its own, for its ranks have said what there is to say.

    python -m scripts.torchrun --nproc_per_node 2 train_sft_vlm.py      # takes the flags of torchrun

After Ctrl-C torchrun shows a traceback of 40 lines below what the training said, and one of its own below that of a
rank that failed. And it gives the ranks 30 seconds, here 10 minutes, to finish their step and to save; and two runs on
one machine want the same port.
"""

if __spec__ is None:  # started by its path, from where Python finds no other folder
    raise SystemExit("type -m scripts.torchrun instead of scripts/torchrun.py")

from common.start import begin

if __name__ == "__main__":
    begin()  # Ctrl-C or a missing package is one sentence from here on

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
        sys.argv.insert(1, "--standalone")  # on a port that is free, where another run has the usual one
    try:
        torchrun()
    except SignalException:
        sys.exit(130)
    except ChildFailedError as error:
        status = error.get_first_failure()[1].exitcode
        if status < 0:  # killed: whoever asks why this process ended should see the same
            os.kill(os.getpid(), -status)
        sys.exit(status)


if __name__ == "__main__":
    main()
