"""Starting ranks: one process, spawned ones, torchrun, several nodes."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.process import BaseProcess
from multiprocessing.queues import SimpleQueue
from typing import NamedTuple, TypeVar

import torch

from mocov3.config.running import RankFlags
from mocov3.distributed.meeting import largest_dividing, name_group, open_store, stand_by, tell_done
from mocov3.distributed.world import World, start
from mocov3.errors import RankLost, UserError, lenient_output, stop_signals
from mocov3.output.log import warn

P = TypeVar("P")
Task = Callable[[World, P], int]
"""What ``launch`` runs on every rank: (world, payload) → exit code."""


def launch(
    task: Task[P],
    payload: P,
    *,
    device: str = "auto",
    gpu: int | None = None,
    spawn: bool = False,
    processes: int = 0,
    nodes: int = -1,
    node_rank: int = -1,
    address: str = "",
    backend: str = "nccl",
    timeout_minutes: float = 30,
    batch: int = 0,
) -> int:
    """Run ``task(world, payload)`` on every rank that belongs to this node, and return its exit code.

    Ranks come from torchrun's environment; or from ``spawn``/``processes`` (one a GPU, or so many, on each of
    ``nodes``); or from ``nodes`` and ``node_rank`` alone (every process started by hand); else there is one.

    torchrun may bring another number of ranks at every start: where ``batch`` does not divide over them, the largest
    number over which it does trains, and the others idle.

    Raises:
        UserError: if the device does not exist or ranks do not meet.
        RankLost: if another rank is gone, at once where that shows, else after ``timeout_minutes`` of silence.
    """
    meet = Meeting(backend, address, timeout_minutes)
    if not (spawn or processes > 1) and (given := from_torchrun()) is not None:
        rank, size, local = given
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        meet = meet._replace(address="env://")
        trains = largest_dividing(size, batch)
        if rank >= trains:
            return stand_by(meet.address, rank, meet.timeout)
        if trains < size and rank == 0:
            warn(f"a batch of {batch} does not divide over {size} processes: {trains} train, {size - trains} idle")
        code = _run(task, payload, rank, trains, here, pick_device(device, local if gpu is None else gpu), meet)
        if trains < size and rank == 0:
            tell_done(meet.address, meet.timeout, code)
        return code
    if address == "env://":
        nodes = int(os.environ.get("WORLD_SIZE", nodes)) if nodes < 1 else nodes
        node_rank = int(os.environ.get("RANK", node_rank)) if node_rank < 0 else node_rank
    nodes, node_rank = max(nodes, 1), max(node_rank, 0)
    if node_rank >= nodes:
        raise UserError(f"--rank {node_rank} is not below --world-size {nodes}")
    if not (spawn or processes > 1):
        if nodes > 1 and not address:
            raise UserError(f"--world-size {nodes} needs --dist-url tcp://HOST:PORT, the same on all")
        return _run(task, payload, node_rank, nodes, 1, pick_device(device, gpu), meet)
    gpus = torch.cuda.device_count() if device in ("auto", "cuda") else 0
    processes = processes or max(gpus, 1)
    if gpus and processes > gpus:
        raise UserError(f"--nprocs-per-node {processes}: this node has {gpus} GPUs; or give --device cpu")
    if not address:
        if nodes > 1:
            raise UserError(f"--world-size {nodes} needs --dist-url tcp://HOST:PORT, the same on all nodes")
        address = free_loopback_address()
    ranks = [(node_rank * processes + local, nodes * processes, local) for local in range(processes)]
    return _spawn(task, payload, ranks, device, meet._replace(address=address))


def launch_as(config: RankFlags, task: Task[P], payload: P, *, timeout_minutes: float = 30, batch: int = 0) -> int:
    """``launch`` by the reference's flags for ranks, as ``PretrainConfig`` and ``LinclsConfig`` hold them."""
    return launch(
        task,
        payload,
        device=config.device,
        gpu=config.gpu,
        spawn=config.multiprocessing_distributed,
        processes=config.nprocs_per_node,
        nodes=config.world_size,
        node_rank=config.rank,
        address="" if config.dist_url == type(config).dist_url else config.dist_url,
        backend=config.dist_backend,
        timeout_minutes=timeout_minutes,
        batch=batch,
    )


class Ranks(NamedTuple):
    """How many processes train."""

    size: int
    here: int
    """Of them on this node."""


def count_ranks(config: RankFlags) -> Ranks:
    """The processes that ``launch_as`` would start, or that torchrun has started."""
    spawn = config.multiprocessing_distributed or config.nprocs_per_node > 1
    if not spawn and (given := from_torchrun()) is not None:
        return Ranks(given[1], int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    nodes = max(config.world_size, 1)
    gpus = torch.cuda.device_count() if config.device in ("auto", "cuda") else 0
    here = config.nprocs_per_node or max(gpus, 1) if spawn else 1
    return Ranks(nodes * here, here)


def decided_once(decide: Callable[[], str], name: str, timeout_minutes: float = 30) -> str:
    """What ``decide`` says, on every process that torchrun started: the first decides, and tells the others.

    They may see other things (a GPU's time, the clock, a random number), and must agree.

    Args:
        decide: called on rank 0 alone.
        name: of the decision.
        timeout_minutes: how long the others wait.

    Raises:
        UserError: on every process, if rank 0 raises it; and where it is not heard of.
    """
    given = from_torchrun()
    if given is None or given[1] == 1:
        return decide()
    try:
        store = open_store("env://", given[0], timedelta(minutes=timeout_minutes))
        _open_stores.append(store)
        # the store may hold what a former start of the group decided
        key = f"{name_group(store, given[0], given[1], 60 * timeout_minutes)}/{name}"
        if given[0]:
            kind, _, text = store.get(key).decode().partition(" ")
            if kind == "refused":
                raise UserError(text)
            return text
    except (RuntimeError, ValueError) as error:
        raise UserError(f"rank {given[0]}: rank 0 did not tell its {name}: {str(error)[:200]}") from None
    try:
        text = decide()
    except UserError as error:
        store.set(key, f"refused {error}")
        raise
    store.set(key, f"said {text}")
    return text


_open_stores: list[object] = []
"""Kept while this process lives: others may not have read yet."""


class Meeting(NamedTuple):
    """How ranks connect, and how long one may be silent."""

    backend: str
    address: str
    timeout_minutes: float

    @property
    def timeout(self) -> timedelta:
        """The same, as torch wants it."""
        return timedelta(minutes=self.timeout_minutes)


def _run(task: Task[P], payload: P, rank: int, size: int, here: int, device: torch.device, meet: Meeting) -> int:
    if here > 1 and device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max((os.cpu_count() or 1) // here, 1))  # ranks would fight over the cores
    world = start(rank, size, device, local_size=here, **meet._asdict())
    reason = ""
    try:
        return task(world, payload)
    except UserError as error:
        reason = str(error)
        raise
    except RuntimeError as error:
        reason = f"{type(error).__name__}"
        if gone := world.blame():  # the error of a collective call names no rank
            reason = gone
            raise RankLost(f"{gone}; rank {rank} ends; continue with --resume auto") from None
        raise
    except BaseException as error:  # whatever it is, the others would wait for this rank
        reason = type(error).__name__
        raise
    finally:
        world.finish(reason)


def _spawn(task: Task[P], payload: P, ranks: list[tuple[int, int, int]], device: str, meet: Meeting) -> int:
    context = multiprocessing.get_context("spawn")
    messages = context.SimpleQueue()
    children = [
        context.Process(target=_child, args=(messages, task, payload, rank, len(ranks), device, meet)) for rank in ranks
    ]
    handlers = {}
    try:
        for number in stop_signals():  # the ranks decide; they get what this process gets
            handlers[number] = signal.signal(number, lambda n, _: _pass_on(children, n))
        for child in children:
            child.start()
        _wait(children)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for child in children:
            if child.is_alive():
                child.kill()
    if not messages.empty():
        raise UserError(messages.get())
    codes = [child.exitcode or 0 for child in children]
    failed = [(rank[0], code) for rank, code in zip(ranks, codes, strict=True) if code]
    for rank, code in failed:
        if code < 0:
            print(f"mocov3: rank {rank} was killed by signal {-code}", file=sys.stderr)
    return max((code if code > 0 else 1 for _, code in failed), default=0)


def _wait(children: Sequence[BaseProcess], grace: float = 20.0) -> None:
    """Wait for all; once one failed, the others get ``grace`` seconds (they may hang in a collective call)."""
    deadline = None
    while any(child.is_alive() for child in children):
        multiprocessing.connection.wait([c.sentinel for c in children if c.is_alive()], timeout=1.0)
        if deadline is None and any(c.exitcode for c in children):
            deadline = time.monotonic() + grace
        if deadline is not None and time.monotonic() > deadline:
            return


def _pass_on(children: Sequence[BaseProcess], number: int) -> None:
    for child in children:
        if child.pid and child.is_alive():
            os.kill(child.pid, number)


def _child(
    queue: SimpleQueue[str], task: Task[P], payload: P, at: tuple[int, int, int], here: int, device: str, meet: Meeting
) -> None:
    rank, size, local = at
    lenient_output()
    try:
        code = _run(task, payload, rank, size, here, pick_device(device, local), meet)
    except UserError as error:
        queue.put(str(error))
        code = error.exit_code
    except RankLost as error:
        print(f"mocov3: error: {error}", file=sys.stderr, flush=True)
        code = error.exit_code
    sys.exit(code)


def pick_device(name: str, index: int | None) -> torch.device:
    """The best device of ``auto``, or the named one.

    Raises:
        UserError: if the named device is not here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise UserError("--device cuda: torch finds no CUDA device here; use --device cpu")
        if index is not None and index >= torch.cuda.device_count():
            raise UserError(f"GPU {index} does not exist; this machine has {torch.cuda.device_count()}, from 0")
        device = torch.device("cuda", index or 0)
        torch.cuda.set_device(device)
        return device
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: torch finds no such device here; use --device cpu")
    return torch.device(name)


def free_loopback_address() -> str:
    """``tcp://127.0.0.1:PORT`` of a port that is free now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{s.getsockname()[1]}"


def from_torchrun() -> tuple[int, int, int] | None:
    """(rank, world size, local rank) as torchrun set them, or ``None`` where it did not start this process."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    if not all(name in os.environ for name in names):
        return None
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
