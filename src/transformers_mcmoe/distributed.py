# SPDX-License-Identifier: Apache-2.0
"""The processes of a compression: which of them does what, and how results come together. One process is the world of one.

`torchrun` and `accelerate launch` start the processes, `world_size` says that they work together; they share a work folder and the dense checkpoint. Every rank holds the
hidden states of all tokens and makes the same decisions. The costly work is dealt: an expert's Hessians, rounding and errors are one
rank's, a sequence runs through a finished layer on one rank, and results are handed to all. So no sum is ever split between ranks, and
the output is the same to the bit for any number of them (docs/scale.md says what that costs and saves).
"""

from __future__ import annotations

import atexit
import heapq
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)

# a rank may wait that long for another's part of a layer; one that has ended is noticed where it is waited for
PATIENCE = timedelta(hours=12)
# what is said of a connection that is gone
LOST = ("closed", "connect", "peer", "reset", "refused", "pipe", "timed out", "timeout")


class RankLost(RuntimeError):
    """Another process of the run has ended."""


class RankDone(Exception):
    """A rank other than the first has done its part, and does not need the model."""


class World:
    """The ranks of this run.

    Attributes:
        rank: of this process.
        size: how many there are.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes what there is once."""
        return self.rank == 0

    def device(self, asked: torch.device | None) -> torch.device:
        """The device of this process: each has a GPU of its own."""
        if asked is None:
            return torch.device("cpu")
        if asked.type == "cuda" and self.size > 1:
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        return asked

    def deal(self, items: Sequence[K], costs: Sequence[float] | None = None) -> list[K]:
        """Those of the items that are this rank's, in their order: the dearest go first, each to the rank that has least to do."""
        if self.size == 1:
            return list(items)
        costs = [1.0] * len(items) if costs is None else costs
        loads = [(0.0, rank) for rank in range(self.size)]
        mine = set()
        for n in sorted(range(len(items)), key=lambda n: (-costs[n], n)):
            load, rank = heapq.heappop(loads)
            heapq.heappush(loads, (load + costs[n], rank))
            if rank == self.rank:
                mine.add(n)
        return [item for n, item in enumerate(items) if n in mine]

    def gather(self, value: T) -> list[T]:
        """What every rank has, by rank; any object that can be pickled, small ones."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        self._call(lambda: dist.all_gather_object(found, value))
        return found

    def merge(self, own: Mapping[K, T]) -> dict[K, T]:
        """The entries of all ranks together."""
        return {key: value for part in self.gather(own) for key, value in part.items()}

    def first(self, find: Callable[[], T]) -> T:
        """What rank 0 finds, on all ranks; what it raises is raised on all of them."""
        if self.size == 1:
            return find()
        outcome: list[Any] = [None, None]
        if self.leads:
            try:
                outcome[0] = find()
            except Exception as error:
                outcome[1] = error
        self._call(lambda: dist.broadcast_object_list(outcome, 0))
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def agree(self, problem: str | None) -> None:
        """Raise ValueError on all ranks if one of them has a problem."""
        for found in self.gather(problem):
            if found is not None:
                raise ValueError(found)

    def share(self, tensor: Tensor, owner: int) -> Tensor:
        """A tensor of one rank, on all; the others give one of its shape and dtype, which is filled."""
        if self.size > 1:
            # a view of bytes: gloo does not know every dtype
            self._call(lambda: dist.broadcast(tensor.reshape(-1).view(torch.uint8), owner))
        return tensor

    def union(self, own: Mapping[K, Tensor]) -> dict[K, Tensor]:
        """The tensors of all ranks by name."""
        if self.size == 1:
            return dict(own)
        found: dict[K, Tensor] = {}
        for owner, shapes in enumerate(self.gather({key: (x.shape, x.dtype) for key, x in own.items()})):
            for key, (shape, dtype) in shapes.items():
                tensor = own[key].contiguous() if owner == self.rank else torch.empty(shape, dtype=dtype)
                found[key] = self.share(tensor, owner) if tensor.numel() else tensor
        return found

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.gather(None)

    def _call(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except RuntimeError as error:  # gloo has no error of its own
            reason = str(error).strip().split("\n")[0]
            if not isinstance(error, dist.DistError) and not any(word in reason.lower() for word in LOST):
                raise
            raise RankLost(
                f"Another of the {self.size} processes has ended, or cannot be reached (rank {self.rank} was told: {reason}); "
                "see what it said, and start the same command again with --resume."
            ) from error


def launched() -> int:
    """How many processes a launcher has started, this one among them."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def world(size: int | None, device: torch.device | None = None) -> World:
    """The ranks of a run.

    Args:
        size: how many there must be; None is this process alone, whatever was launched.
        device: what they compute on.

    Raises:
        ValueError: there are more or fewer processes, or fewer GPUs on this machine.
    """
    if size is None:
        return World()
    if size != launched():
        running = "1 process runs" if launched() == 1 else f"{launched()} processes run"
        raise ValueError(
            f"world_size={size} was asked for, but {running}; start them with torchrun --nproc-per-node {size}, "
            "for the command: torchrun --nproc-per-node N -m transformers_mcmoe compress ..."
        )
    if size == 1:
        return World()
    if not dist.is_initialized():
        gpus = device is not None and device.type == "cuda"
        if gpus:
            local = int(os.environ.get("LOCAL_RANK", "0"))
            if local >= torch.cuda.device_count():
                raise ValueError(
                    f"The process of local rank {local} has no GPU: there are {torch.cuda.device_count()}; start as many processes."
                )
            torch.cuda.set_device(local)
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=PATIENCE)
        atexit.register(_leave)
    return World(dist.get_rank(), dist.get_world_size())


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
