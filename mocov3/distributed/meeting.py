"""Where ranks connect: a store that all can reach, and the roll call in it, which names those that are missing.

Under torchrun the number of ranks may change from one start to the next (elastic): where the batch does not divide over
them, the largest number that it divides over trains, and the others idle.
"""

import os
import secrets
import signal
import time
from datetime import timedelta
from urllib.parse import urlparse

import torch.distributed as dist

_DONE = "mocov3/done"


def open_store(address: str, rank: int, timeout: timedelta) -> dist.TCPStore:
    """The store at ``tcp://HOST:PORT`` or, as the environment says, ``env://``; rank 0 keeps it, unless torchrun does.

    It does not wait for the others: the roll call does, and can name them.

    Raises:
        RuntimeError: if rank 0 does not come.
        ValueError: if the address is none of these.
    """
    if address == "env://":
        host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
        if not host or not port.isdigit():
            raise ValueError("env:// needs MASTER_ADDR and MASTER_PORT in the environment")
        keeps = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        number = int(port)
    else:
        parsed = urlparse(address)
        if parsed.scheme != "tcp" or not parsed.hostname or not parsed.port:
            raise ValueError("give tcp://HOST:PORT or env://")
        host, number, keeps = parsed.hostname, parsed.port, rank == 0
    try:
        return dist.TCPStore(host, number, is_master=keeps, timeout=timeout, wait_for_workers=False, multi_tenant=True)
    except RuntimeError:
        if keeps:
            raise
        waited = f"{timeout.total_seconds():.0f} s"
        raise RuntimeError(f"rank 0 did not connect within {waited} (no answer at {host}:{number})") from None


def name_group(store: dist.Store, rank: int, size: int, seconds: float) -> str:
    """A name for this start of the ranks that no earlier one in the same store has.

    torchrun keeps its store when it starts a group again, and what the former group left there makes the new one wait
    for ever. Ranks cannot tell old keys from new ones, but for those named by a token of their own: each says hello
    with its token until rank 0 has answered to it.

    Raises:
        RuntimeError: naming the ranks that did not connect.
    """
    end = time.monotonic() + seconds
    token = secrets.token_hex(8)
    missing = set(range(1, size)) if rank == 0 else {0}
    while missing:
        if time.monotonic() > end:
            raise RuntimeError(
                f"rank {', '.join(map(str, sorted(missing)[:5]))} did not connect within {seconds:.0f} s"
            )
        if rank == 0:
            for other in sorted(missing):
                if store.check([f"hello/{other}"]):
                    store.set(f"welcome/{store.get(f'hello/{other}').decode()}", token)
                if store.check([f"{token}/{other}"]):
                    missing.discard(other)
        else:
            store.set(f"hello/{rank}", token)
            if store.check([f"welcome/{token}"]):
                token = store.get(f"welcome/{token}").decode()
                store.set(f"{token}/{rank}", "")
                break
        time.sleep(0.02)
    return token


def largest_dividing(size: int, batch: int) -> int:
    """The largest number of ranks up to ``size`` over which ``batch`` divides; ``batch`` 0: any."""
    return next(n for n in range(size, 0, -1) if batch % n == 0)


def stand_by(address: str, rank: int, timeout: timedelta, period: float = 1.0) -> int:
    """Wait until the ranks that train are done, and return their exit code; torchrun ends this rank if one fails."""
    if hasattr(signal, "SIGUSR1"):  # asks those that train for a checkpoint
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    store = open_store(address, rank, timeout)
    try:
        while not store.check([_DONE]):
            time.sleep(period)
        return int(store.get(_DONE))
    except RuntimeError:  # the store is gone, and the job with it
        return 0


def tell_done(address: str, timeout: timedelta, code: int) -> None:
    """Release the idle ranks."""
    open_store(address, 1, timeout).set(_DONE, str(code))
