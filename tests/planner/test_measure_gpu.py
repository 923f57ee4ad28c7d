"""The GPU measuring script as far as a machine without a GPU can try it: cases, document, FLOPs."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch", exc_type=ImportError)

from tests.helpers import llama

SCRIPT = Path(__file__).parents[2] / "tools" / "measure_gpu.py"
SMALL = {"hidden": 128, "layers": 3, "heads": 4, "kv_heads": 2, "ffn": 320, "vocab": 512}


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    spec = importlib.util.spec_from_file_location("measure_gpu", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    from torch import distributed

    if distributed.is_initialized():  # the script is a process of its own and leaves its group to the end
        distributed.destroy_process_group()


@pytest.fixture
def run(script: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def main(*args: str) -> int:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *args])
        return int(script.main())

    return main


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from numbers(item)
    elif isinstance(value, int | float):
        yield value


def test_the_list_needs_no_gpu_and_names_every_case_once(
    script: Any, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--list") == 0
    listed = capsys.readouterr().out.split()
    assert len(listed) == len(set(listed)) > 100
    assert {one.split(":")[0] for one in listed} == {
        *("context", "memory", "matmul", "attention", "bandwidth", "optimizer")
    }
    tiny = [case.id for case in script.all_cases(True)]
    assert len(set(tiny)) == len(listed)
    quick = [case for case in script.all_cases(False) if case.quick]
    assert 15 < len(quick) < 45


def test_a_dry_run_writes_the_document_and_keeps_what_its_time_allows(
    run: Callable[..., int], tmp_path: Path
) -> None:
    out = tmp_path / "result.json"
    budget = ("--minutes", "0.06", "--only", "memory", "--compare")
    code = run("--dry-run", "--quick", "--repeats", "1", *budget, "--out", str(out))
    document = json.loads(out.read_text())
    assert document["schema"] == "planner.gpu-measurements/1"
    assert document["dry_run"]
    assert document["facts"]["torch"]
    assert document["complete"] == (not document["not_run"]) == (code == 0)
    assert document["cases"]
    for case in document["cases"]:
        assert case["error"] is None
        assert case["result"]["tokens_per_second"] > 0
        assert "predicted" in case
    assert all(math.isfinite(x) for x in numbers(document))
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    "what",
    [
        {"recompute": "selective"},
        {"recompute": "full", "optimizer": "sgd", "accumulate": 2},
        {"precision": "autocast", "optimizer": "adamw-foreach"},
        {"precision": "fsdp", "recompute": "full"},
    ],
    ids=str,
)
def test_a_training_case_runs(script: Any, what: dict[str, Any]) -> None:
    own = next(script.memory_cases(True))
    result = script.run_memory(own.settings | what, script.Device(True, 1))
    assert result["allocated_peak_bytes"] is None
    assert result["loss"] > 0
    assert result["parameter_bytes"] == result["parameters"] * (4 if "precision" in what else 2)
    assert set(result["phases"]) == {"forward", "backward", "step"}
    assert result["total_seconds"] > 0


@pytest.mark.parametrize("kind", ["context:comm", "attention", "bandwidth", "optimizer"])
def test_other_cases_run(script: Any, kind: str) -> None:
    case = next(one for one in script.all_cases(True) if one.id.startswith(kind))
    record = script.attempt(case, script.Device(True, 1))
    assert record["error"] is None
    assert all(x > 0 for x in numbers(record["result"]))


def test_a_case_out_of_memory_is_recorded_and_its_tensors_are_freed(script: Any) -> None:
    case = script.Case("bandwidth:too-much", "compute", {"tensor_bytes": [2**60]}, False)
    record = script.attempt(case, script.Device(True, 1))
    assert record["result"] is None
    assert record["error"]
    assert "\n" not in record["error"]
    assert script.failed(RuntimeError("CUDA out of memory. Tried\nmore"))["oom"]


def test_flops_are_those_of_the_products_that_run(script: Any) -> None:
    """Against torch's own counter over the script's module, and the planner's formula."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    shape, seq, batch = script.Shape(**SMALL), 96, 2
    model = script.Decoder(shape, seq, "none")
    ids = torch.randint(shape.vocab, (batch, seq))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(ids, ids).backward()
    assert shape.flops(seq, batch) == counter.get_total_flops()
    spec = llama(
        SMALL["layers"],
        SMALL["hidden"],
        SMALL["heads"],
        SMALL["kv_heads"],
        intermediate_size=SMALL["ffn"],
        vocab_size=SMALL["vocab"],
    )
    assert shape.flops(seq, batch) == pytest.approx(batch * seq * spec.flops_per_token(seq), rel=1e-9)


def test_selective_recompute_gives_the_same_gradients_and_keeps_less(script: Any) -> None:
    import torch

    kept, gradients = {}, {}
    for policy in ("none", "selective", "full"):
        torch.manual_seed(0)
        model = script.Decoder(script.Shape(**SMALL), 32, policy)
        ids = torch.arange(64).view(2, 32)
        sizes: dict[int, int] = {}

        def pack(x: Any, sizes: dict[int, int] = sizes) -> Any:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = model(ids, ids)
        loss.backward()
        kept[policy], gradients[policy] = sum(sizes.values()), [p.grad for p in model.parameters()]
    for policy in ("selective", "full"):
        assert kept[policy] < kept["none"]
        for one, other in zip(gradients["none"], gradients[policy], strict=True):
            torch.testing.assert_close(one, other)


def test_without_a_gpu_it_says_so(
    script: Any, run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if script.torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit) as ended:
        run("--out", str(tmp_path / "none.json"))
    assert ended.value.code == 2
    assert "no CUDA GPU" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "none.json").exists()
