"""Runs exported scripts as torchrun would: a process for each rank, with its environment.

torch and transformers are imported once, and each case's processes are forked from there; each then runs
the script's own text as ``__main__``. A case is ``{"script": ..., "world": 4, "arguments": [...]}``; with a
``saved`` configuration the folder that the script runs in has a model of it, in ``weights``.
"""

import faulthandler
import json
import os
import runpy
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}

import numpy  # noqa: F401
import torch
import torch.distributed.fsdp
import transformers
import transformers.models.auto.modeling_auto

SECONDS = 90  # that a case may take
torch.set_num_threads(1)
for family in ("llama", "gpt2", "qwen2", "mixtral"):
    __import__(f"transformers.models.{family}.modeling_{family}")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def save(values: dict, folder: Path) -> None:
    """A model with weights, as transformers makes it at once; by a process whose words nobody reads."""
    if child := os.fork():
        os.waitpid(child, 0)
        return
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.manual_seed(1)
    config = transformers.CONFIG_MAPPING[values.pop("model_type")](**values)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    os._exit(0)


def be(rank: int, case: dict, port: int, folder: Path) -> None:
    """One process, until it ends."""
    out = os.open(folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    faulthandler.enable()
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": case["world"], "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in world.items()} | {"MASTER_ADDR": "127.0.0.1"}
    os.chdir(folder)
    sys.argv = ["train.py", *case.get("arguments", []), f"--report={folder / 'report.json'}"]
    code = 1
    try:
        runpy.run_path(str(folder / "train.py"), run_name="__main__")
        code = 0
    except SystemExit as error:
        print(error)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


def judge(case: dict) -> dict:
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        (folder / "train.py").write_text(case["script"])
        if values := case.get("saved"):
            save(dict(values), folder / "weights")
        children = []
        for rank in range(case["world"]):
            if not (child := os.fork()):
                be(rank, case, port, folder)
            children.append(child)
        left, codes, deadline = set(children), {}, time.time() + SECONDS + 10
        while left:
            for child in list(left):
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    left.remove(child)
                    codes[child] = os.waitstatus_to_exitcode(status)
            if time.time() > deadline or any(codes.values()):
                for child in left:
                    os.kill(child, 9)
            time.sleep(0.05)
        report = folder / "report.json"
        outputs = [(folder / f"{rank}.txt").read_text(errors="replace") for rank in range(case["world"])]
        return {
            "codes": [codes[child] for child in children],
            "report": json.loads(report.read_text()) if report.exists() else None,
            "output": outputs[0][-3000:],
            "errors": [one[-1500:] for one, child in zip(outputs, children, strict=True) if codes[child]],
        }


for one in json.load(sys.stdin):
    print(json.dumps(judge(one)), flush=True)
