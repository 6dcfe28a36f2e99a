"""An MLP with packed weights over several GPUs: torchrun --nproc-per-node 2 examples/two_gpus.py (without GPUs: over processes)

The first product is cut by its outputs and needs no communication; the second by its inputs, at multiples of the slice unit,
and its parts are added up. Each process loads its own part; here every one packs the whole, so that the result can be checked.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch.nn.functional import silu

import slidesparse_nb as ss
from slidesparse_nb.integrations.torch import SparseLinear

TOKENS, HIDDEN, INNER = 64, 1024, 4096


def share(size: int, unit: int, rank: int, ranks: int) -> tuple[int, int]:
    """This process's part of `size`, which must be cut into equal multiples of `unit`."""
    if size % (ranks * unit):
        raise SystemExit(f"{size} over {ranks} processes must be a multiple of {ranks * unit}; use fewer processes")
    return rank * size // ranks, (rank + 1) * size // ranks


def main() -> None:
    gpus = torch.cuda.is_available()
    if gpus:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = torch.device("cuda", torch.cuda.current_device()) if gpus else torch.device("cpu")
    dist.init_process_group("nccl" if gpus else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()

    drawn = torch.Generator().manual_seed(0)
    w1, w2 = (torch.randn(n, k, generator=drawn) / k**0.5 for n, k in ((INNER, HIDDEN), (HIDDEN, INNER)))
    x = torch.randn(TOKENS, HIDDEN, generator=drawn).bfloat16().to(device)
    up, down = (ss.pack(w.numpy(), "6:8", "int8", prune="magnitude") for w in (w1, w2))

    part = share(INNER, down.slice_unit, rank, ranks)
    column = SparseLinear.from_packed(up.rows(*part), device=device)
    row = SparseLinear.from_packed(down.columns(*part), device=device)
    y = row(silu(column(x))).float()
    dist.all_reduce(y)

    if rank == 0:
        whole = [SparseLinear.from_packed(packed, device=device) for packed in (up, down)]
        expected = whole[1](silu(whole[0](x))).float()
        error = ((y - expected).norm() / expected.norm()).item()
        print(f"{ranks} processes on {device.type}: relative difference from one {error:.4f} (scales of x are those of a part)")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
