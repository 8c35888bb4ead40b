"""torchrun that ends with the status of a run that stopped on request.

``python -m megatron_dypo.torchrun ARGUMENTS`` takes torchrun's arguments. torchrun itself ends with 1 whatever the
status of its ranks was, and dies of the SIGUSR1 that is meant for them.
"""

from __future__ import annotations

import sys

from megatron_dypo.preemption import PREEMPTED_STATUS, hold_requests


def main() -> int:
    hold_requests()
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.main()
    except ChildFailedError as error:
        if PREEMPTED_STATUS not in {failure.exitcode for failure in error.failures.values()}:
            raise
        return PREEMPTED_STATUS
    return 0


if __name__ == "__main__":
    sys.exit(main())
