"""nanotron's own loader on exported YAML, its kernels and data packages left out."""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import io
import json
import sys
import tempfile
import types
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

warnings.filterwarnings("ignore")
sys.path.pop(0)  # this folder, whose files have the names of the tools
ABSENT = (
    *("flash_attn", "flash_attn_2_cuda", "rotary_emb", "grouped_gemm", "functorch", "triton", "datatrove"),
    *("numba", "s5cmd", "boto3", "datasets", "torchtyping", "ring_flash_attn", "wandb"),
)


class Inert:
    """Stands for anything of a package that is not there: a decorator, a class, a function."""

    def __init__(self, *args: Any, **more: Any) -> None: ...

    def __call__(self, *args: Any, **more: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) and not more else self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __getitem__(self, key: Any) -> Any:
        return self

    def __mro_entries__(self, bases: Any) -> tuple[Any, ...]:
        return ()


class Module(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return str if name == "xPath" else Inert()


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds packages that are not installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.split(".")[0] in MISSING:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        module = Module(spec.name)
        module.__path__, module.__version__ = [], "0.0.0"
        return module

    def exec_module(self, module: types.ModuleType) -> None: ...


MISSING = {name for name in ABSENT if importlib.util.find_spec(name) is None}
sys.meta_path.append(Finder())
with contextlib.redirect_stdout(io.StringIO()):
    import nanotron.logging  # noqa: F401 - before its configuration, which it imports in turn
    from nanotron.config import get_config_from_file


def split_of(config: Any) -> list[int]:
    """Layers on each stage: the rule of nanotron.models.base.build_model with the model's own costs."""
    from itertools import accumulate

    from nanotron.models import llama, qwen

    model, stages = config.model.model_config, config.parallelism.pp
    kind = type(model).__name__
    own = llama.LlamaModel if kind == "LlamaConfig" else qwen.Qwen2Model
    costs = own.get_block_compute_costs(SimpleNamespace(config=model))
    layer, head = (
        next(cost for block, cost in costs.items() if ("Decoder" in block.__name__) == wanted)
        for wanted in (True, False)
    )
    blocks = [0, *[layer] * model.num_hidden_layers, 0, head, 0]
    sums = list(accumulate(blocks))
    counts, stage = [0] * stages, 0
    for index, done in enumerate(sums):
        counts[stage] += 1 <= index <= model.num_hidden_layers
        if done > sums[-1] * (stage + 1) / stages:
            stage += 1
    return counts


def read(text: str, path: Path) -> dict[str, Any]:
    path.write_text(text)
    found = get_config_from_file(str(path))
    places, tokens, model = found.parallelism, found.tokens, found.model.model_config
    return {
        "degrees": [places.dp, places.pp, places.tp, places.context_parallel_size],
        "engine": type(places.pp_engine).__name__,
        "mode": places.tp_mode.name,
        "recompute": places.recompute_layer,
        "zero": found.optimizer.zero_stage,
        "fp32": found.optimizer.accumulate_grad_in_fp32,
        "optimizer": found.optimizer.optimizer_factory.name,
        "batch": [found.global_batch_size, tokens.micro_batch_size, tokens.batch_accumulation_per_replica],
        "seq": tokens.sequence_length,
        "steps": tokens.train_steps,
        "dtype": str(found.model.dtype),
        "kind": type(model).__name__,
        "layers": model.num_hidden_layers,
        "heads": [model.num_attention_heads, model.num_key_value_heads],
        "widths": [model.hidden_size, model.intermediate_size, model.vocab_size],
        "tied": model.tie_word_embeddings,
        "project": found.general.project,
        "split": split_of(found),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for text in json.load(sys.stdin):
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    answer = {"ok": True, **read(text, Path(folder) / "plan.yaml")}
            except Exception as error:
                answer = {"ok": False, "error": f"{type(error).__name__}: {error}"[:400]}
            print(json.dumps(answer), flush=True)


main()
