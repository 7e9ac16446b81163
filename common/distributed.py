"""One process (rank) per device, started by `torchrun`; or a single process. Every function works in both cases."""

import os
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

patient = None  # the group in which other ranks wait while rank 0 checks or downloads rows, perhaps for hours


def start(device: torch.device) -> None:
    """Joins the other ranks if `torchrun` started this process. NCCL carries CUDA tensors, gloo all others."""
    if "WORLD_SIZE" in os.environ and int(os.environ["WORLD_SIZE"]) > 1 and not dist.is_initialized():
        global patient
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))  # a hanging rank causes an error after this
        patient = dist.new_group(backend="gloo", timeout=timedelta(hours=3))


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def say(*text) -> None:
    """print() on rank 0 only."""
    if is_main():
        print(*text, flush=True)


def all_sum(*numbers: float) -> list[float]:
    """The sum of each number over all ranks. Computed on the CPU, without waiting for the device's queue."""
    totals = torch.tensor(numbers, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(totals)
    return totals.tolist()


def sum_gradients(weights) -> None:
    """Adds up the gradients of each weight over all ranks, for steps without DistributedDataParallel."""
    if dist.is_initialized():
        for weight in weights:
            if weight.grad is None:  # a rank without a row
                weight.grad = torch.zeros_like(weight)
            dist.all_reduce(weight.grad)


def gather(value) -> list:
    """Collects the value of every rank, in order; every rank gets the list."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


@contextmanager
def main_first():
    """The first rank of each machine runs the block first; the others run it afterwards and find the results in the
    cache. Yields whether this is the first rank."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if dist.is_initialized() and not first:
        dist.barrier(patient)
    try:
        yield first
    finally:  # also after an error, because the others wait
        if dist.is_initialized() and first:
            dist.barrier(patient)
