"""Stands in for a training program: every rank says where it is, by PyTorch's own mesh of the plan's degrees.

    coordinates.py PP DP CP TP [ANYTHING ...]

A line of JSON for each rank: its node and GPU, its place in the mesh, the sum of the ranks of its tensor
parallel group as Gloo makes it, and the arguments as they came.
"""

import json
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

names = ("pp", "dp", "cp", "tp")
mesh = init_device_mesh("cpu", tuple(map(int, sys.argv[1:5])), mesh_dim_names=names)
total = torch.tensor(dist.get_rank())
dist.all_reduce(total, group=mesh.get_group("tp"))
said = {
    "rank": dist.get_rank(),
    "world": dist.get_world_size(),
    "node": os.environ["SLURMD_NODENAME"],
    "gpu": int(os.environ["LOCAL_RANK"]),
    "cpus": len(os.sched_getaffinity(0)),
    "visible": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
    "sum": int(total),
    "env": os.environ.get("SOME_SETTING"),
    "arguments": sys.argv[5:],
    **dict(zip(names, mesh.get_coordinate(), strict=True)),
}
os.write(1, f"{json.dumps(said)}\n".encode())  # at once: ranks share the file
dist.destroy_process_group()
