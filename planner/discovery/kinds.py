"""Which kind of the catalog GPUs are, from what schedulers and drivers call them.

Names are those of Slurm's GRES types (``h100``, or what its NVML plugin makes of the driver's name,
``nvidia_a100-sxm4-80gb``), of GPU Feature Discovery (``NVIDIA-H100-80GB-HBM3``), of the DRA driver
(``NVIDIA H100 80GB HBM3``), of AMD's labeller (``AMD_Instinct_MI300X_OAM``) and of Ray (``H100``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache

from planner.errors import PlannerError
from planner.files import plain
from planner.specs import Gpu

MAKERS = {"nvidia", "tesla", "geforce", "quadro", "amd", "instinct", "oam", "huawei"}
FORMS = {"sxm": "sxm", "sxm2": "sxm", "sxm3": "sxm", "sxm4": "sxm", "sxm5": "sxm", "nvlink": "sxm",
         "hgx": "sxm", "hbm3": "sxm", "hbm3e": "sxm", "pcie": "pcie", "nvl": "nvl"}  # fmt: skip
"""How a GPU is built in. NVIDIA's driver calls the H100 with HBM3 an SXM and the others PCIe or NVL."""
IGNORED = {"nvl72", "gcd", "hbm2", "hbm2e"}
MEMORY = re.compile(r"(\d{2,3})g(?:i?b)?")
NEAR = 0.03
"""Of its memory, by which a driver's figure may differ from the catalog's: what firmware holds back."""


class Unresolved(PlannerError):
    """A name that is no kind of the catalog, or one of several."""


def tidy(label: str) -> str:
    """A name as ``--gpu-type`` takes it: of small letters, with ``-`` between its parts.

    >>> tidy("NVIDIA H100 80GB_HBM3")
    'nvidia-h100-80gb-hbm3'
    """
    return re.sub(r"[\s_]+", "-", label.strip().lower())


def slice_of(label: str) -> str:
    """Why GPUs of that name are none that a process has to itself; empty where they are.

    >>> slice_of("a100_3g.20gb")
    'slices of GPUs (MIG): a process of a plan has a GPU to itself'
    """
    name = tidy(label)
    if "-mig-" in name or re.search(r"(?:^|[^0-9])\dg\.\d+gb", name):
        return "slices of GPUs (MIG): a process of a plan has a GPU to itself"
    if name.endswith("-shared"):
        return "GPUs that several processes share in turn (time slicing): a process has a GPU to itself"
    if name.startswith("grid-") or re.fullmatch(r"(?:nvidia-)?[a-z]+\d+[a-z]*-(?:\d-)?\d+[acq]", name):
        return "parts of GPUs for virtual machines (vGPU): a process has a GPU to itself"
    return ""


def kind_of(
    label: str, memory_mib: int | None, features: Sequence[str], said: Mapping[str, str]
) -> tuple[Gpu, str]:
    """The kind of GPUs of that name, and what was assumed of it, if anything.

    ``memory_mib`` is what a driver reports; ``features`` are words that sites give to nodes: of those only
    a memory that some such kind has (``80g``) and how it is built in (``sxm4``, ``pcie``) count. ``said``
    maps names to kinds and wins. Of kinds that differ in memory the least is assumed, never more; raises
    Unresolved where what a name usually stands for is not the least, and for a name of no kind.
    """
    from planner.catalog import load_gpu

    if (name := tidy(label)) in said:
        return load_gpu(said[name]), ""
    family, form, sizes = _parts(label)
    if not family:
        of_features = {own for one in features if (own := _parts(one)[0]) in _families()}
        if len(of_features) > 1 or not of_features:
            may = f": they may be {' or '.join(sorted(of_features))}" if of_features else ""
            raise Unresolved(f"nobody says which kind they are{may}; {_say(label, ['h100'])}")
        family = of_features.pop()
    kinds = _families().get(family)
    if not kinds:
        raise Unresolved(f"{plain(label)} is no kind of the catalog (planner catalog gpus); "
                         f"{_say(label, ['h100'])} if it is as one of it")  # fmt: skip
    words = [tidy(one) for one in features]
    form = form or next((FORMS[word] for word in words if word in FORMS), "")
    sizes = sizes or {int(m[1]) for word in words if (m := MEMORY.fullmatch(word))} & {
        gpu.marketed_gb for gpu in kinds
    }
    left = [gpu for gpu in kinds if form in ("", _form(gpu))] or (list(kinds) if not _parts(label)[1] else [])
    left = [gpu for gpu in left if not sizes or gpu.marketed_gb in sizes]
    if memory_mib is not None:
        reported = memory_mib * 2**20
        left = [gpu for gpu in left if abs(gpu.memory_bytes - reported) <= NEAR * gpu.memory_bytes]
    if not left:
        told = f"{plain(label)}{f' of {memory_mib:,} MiB' if memory_mib else ''}"
        raise Unresolved(f"{told} is no kind of the catalog: it has {', '.join(gpu.name for gpu in kinds)}; "
                         f"{_say(label, [kinds[0].name])} if it is as one of them")  # fmt: skip
    return _usual(label, family, left)


def _usual(label: str, family: str, left: Sequence[Gpu]) -> tuple[Gpu, str]:
    """Of kinds that a name may stand for, that which it usually does."""
    least = min(gpu.marketed_gb for gpu in left)
    of_least = [gpu for gpu in left if gpu.marketed_gb == least]
    usual = [gpu for gpu in left if family in gpu.aliases or len(left) == 1]
    if not (usual and usual[0] in of_least):
        usual = of_least if len({gpu.marketed_gb for gpu in left}) == 1 else []
        usual = [gpu for gpu in usual if f"{family}-{least}gb" in gpu.aliases] or usual[:1]
    if not usual:
        may = " or ".join(gpu.name for gpu in left)
        raise Unresolved(f"{plain(label)} may be {may}; {_say(label, [gpu.name for gpu in left])}")
    if len(left) == 1:
        return usual[0], ""
    others = ", ".join(gpu.name for gpu in left if gpu is not usual[0])
    chosen = usual[0].name
    return usual[
        0
    ], f"GPU kind: {chosen} for {plain(label) or family}, which may be {others}: --gpu-type says"


def _say(label: str, kinds: Sequence[str]) -> str:
    name = plain(tidy(label)) or "gpu"
    return "say " + " or ".join(f"--gpu-type {name}={kind.lower()}" for kind in kinds)


def _parts(label: str) -> tuple[str, str, set[int]]:
    """Family, form and memory of a name.

    >>> _parts("NVIDIA-A100-SXM4-80GB"), _parts("NVIDIA-GeForce-RTX-4090")
    (('a100', 'sxm', {80}), ('rtx4090', '', set()))
    """
    words = [word for word in re.split(r"[-_\s]+", label.strip().lower()) if word and word not in MAKERS]
    form = next((FORMS[word] for word in words if word == "pcie" or word == "nvl"), "")
    form = form or next((FORMS[word] for word in words if word in FORMS), "")
    sizes = {int(match[1]) for word in words if (match := MEMORY.fullmatch(word))}
    rest = [
        word for word in words if word not in FORMS and word not in IGNORED and not MEMORY.fullmatch(word)
    ]
    return _also().get("".join(rest), "".join(rest)), form, sizes


def _form(gpu: Gpu) -> str:
    """How a kind is built in, as far as its name says."""
    return _parts(gpu.name)[1]


@cache
def _all() -> tuple[Gpu, ...]:
    from planner.catalog import load_gpu, names

    return tuple(load_gpu(name) for name in names("gpus"))


@cache
def _also() -> dict[str, str]:
    """Other names of families: ``910b``, ``4090``."""
    return {"4090": "rtx4090", "910b": "ascend910b", "ascend910b2": "ascend910b", "gpu": ""}


@cache
def _families() -> dict[str, tuple[Gpu, ...]]:
    """Kinds by the name of what they are alike in: ``a100``."""
    found: dict[str, tuple[Gpu, ...]] = {}
    for gpu in _all():
        family = _parts(gpu.name)[0]
        found[family] = (*found.get(family, ()), gpu)
    return found
