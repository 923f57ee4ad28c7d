"""What is given of prices, failures and checkpoints: from the text of a command line, and checked."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from pydantic import ValidationError

from planner.errors import InputError
from planner.specs import ClusterSpec, TrainingSpec, first_problem
from planner.units import parse_bytes, parse_seconds

FLAGS = {
    "price": "--price",
    "gpu_mtbf_s": "--gpu-mtbf",
    "job_mtbf_s": "--job-mtbf",
    "checkpoint_bytes_per_s": "--checkpoint-bandwidth",
    "restart_s": "--restart-time",
    "pue": "--pue",
}


def with_costs(cluster: ClusterSpec, given: dict[str, Any]) -> ClusterSpec:
    """The cluster with what was given of its price, failures, checkpoints and power. Raises InputError."""
    update: dict[str, Any] = {"pue": given.get("pue")}
    if (text := given.get("price")) is not None:
        update["price"], update["currency"] = read_price(text)
    if (text := given.get("checkpoint_bandwidth")) is not None:
        update["checkpoint_bytes_per_s"] = parse_bytes(
            text.removesuffix("/s"), f"{FLAGS['checkpoint_bytes_per_s']} "
        )
    times = {"gpu_mtbf_s": "gpu_mtbf", "job_mtbf_s": "job_mtbf", "restart_s": "restart_time"}
    for field, name in times.items():
        if (text := given.get(name)) is not None:
            update[field] = parse_seconds(text, f"{FLAGS[field]} ")
    try:
        return ClusterSpec(**{**dict(cluster), **update})
    except ValidationError as error:
        problem = first_problem(error)
        for field, flag in FLAGS.items():
            problem = re.sub(rf"\b{field}\b=?", f"{flag} ", problem).replace(f"{flag}  ", f"{flag} ")
        raise InputError(problem.replace(" :", ":")) from None


def read_price(text: str) -> tuple[float, str]:
    """Price of a GPU-hour and its currency, as it was written. Raises InputError.

    >>> read_price("2.5"), read_price("2 EUR")
    ((2.5, ''), (2.0, 'EUR'))
    """
    match = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*(\D{0,8}?)\s*", text)
    if not match or not all(c.isalpha() or unicodedata.category(c) == "Sc" for c in match[2]):
        raise InputError(
            f"--price {text[:40]!r} is not a price of a GPU-hour: write a number, and its currency if you "
            "like, as in 2.5 or 2.5USD"
        )
    return float(match[1]), match[2]


def check(cluster: ClusterSpec, training: TrainingSpec) -> None:
    """Raises InputError for figures that mean nothing without another one, which it names."""
    for name, flag, text in (("price", "--price", "money"), ("pue", "--pue", "energy")):
        if (value := getattr(cluster, name)) is not None and not training.tokens:
            raise InputError(f"{flag} {value:g}: {text} is of a whole training: add --tokens, as in 1.4T")
    mtbf = cluster.mtbf_s
    if mtbf and not cluster.checkpoint_bytes_per_s:
        flag = "--gpu-mtbf" if cluster.gpu_mtbf_s else "--job-mtbf"
        raise InputError(
            f"{flag}: what failures cost depends on how long a checkpoint takes: add --checkpoint-bandwidth, "
            "as in 50GB a second"
        )
    if cluster.restart_s is not None and not mtbf:
        raise InputError(
            f"--restart-time {cluster.restart_s:g} s: restarts follow failures: add --gpu-mtbf or --job-mtbf"
        )
