"""N13: a question to the data plane that nobody is left to answer.

Breaks: every process of a run asks TransferQueue's controller where its rows lie, and waits for the answer
   without end. Where the controller's process is gone (out of memory, its host), the run hangs.
Where: TransferQueue 0.1.11, client.py:155-159 (sockets without a time limit) and client.py:224.
Bound: TransferQueue==0.1.11.
Does: looks after the controller while an answer is awaited, and ends the wait with Ray's account of its
   death, or once ``keytoken.cluster.data_timeout_s`` have passed.
"""

import asyncio
import functools
import os
import time
from typing import Any

from keytoken.cluster_config import DATA_TIMEOUT_VARIABLE
from keytoken.errors import ClusterError
from keytoken.verl_adapter.data_plane import require_alive

# How often a wait for an answer is interrupted by the question whether anybody is left to give it.
LOOK_EVERY_S = 5.0


def apply(client: Any) -> None:
    """Bound the one method by which all questions go to the controller."""
    original = client.AsyncTransferQueueClient._request_controller

    @functools.wraps(original)
    async def request(self: Any, *args: Any, **kwargs: Any) -> Any:
        limit_s, began = float(os.environ.get(DATA_TIMEOUT_VARIABLE, "inf")), time.monotonic()
        answer = asyncio.ensure_future(original(self, *args, **kwargs))
        try:
            while not (await asyncio.wait({answer}, timeout=min(LOOK_EVERY_S, limit_s)))[0]:
                await asyncio.to_thread(require_alive)
                if time.monotonic() - began >= limit_s:
                    raise ClusterError(
                        f"The data plane (TransferQueue's controller) has not answered for {limit_s:g} s. "
                        "Its host may hang: `ray list actors` says where it is. If answers may take that "
                        "long, raise keytoken.cluster.data_timeout_s."
                    )
            return answer.result()
        finally:
            answer.cancel()

    client.AsyncTransferQueueClient._request_controller = request
