"""Random plans come back from their exports: the same layout, peak and step time."""

from __future__ import annotations

from typing import Any

import pytest

from planner.export import export
from planner.export.base import quoted
from planner.export.imported import Imported
from planner.export.read_accelerate import read as read_accelerate
from planner.export.read_deepspeed import read as read_deepspeed
from tests.contract import test_accelerate, test_deepspeed
from tests.contract.plans import expressed, random_plans
from tests.planner.exported import again, same

TARGETS: dict[str, tuple[Any, Any]] = {
    "deepspeed": (test_deepspeed.drawn, read_deepspeed),
    "accelerate": (test_accelerate.drawn, read_accelerate),
}


@pytest.mark.parametrize("target", TARGETS)
def test_random_plans_come_back(target: str) -> None:
    drawn, read = TARGETS[target]
    able, _ = expressed(list(random_plans(40, 23, drawn)), lambda one: export(one, target))
    assert len(able) >= 20
    for subject, made in able:
        launch = quoted(made.on_node(subject, "0", "host"))
        found: Imported = read({**made.files, "launch.sh": launch}, {})
        errors = [one for one in found.findings if one.severity == "error"]
        assert not errors, (errors, made.files)
        # The files do not say how a model is loaded, nor which family peft's names are of.
        training = subject.job.training
        given: dict[str, Any] = {}
        if subject.options().get("kernels") != "megatron":
            given["attention"] = subject.options()["attention"]
        if training.precision == "pure-bf16":
            given["precision"] = "pure-bf16"
        plan = again(subject, found, **given)
        assert same(plan, subject), (plan.layout, subject.plan.layout, found.options)
        assert plan.peak_bytes == subject.plan.peak_bytes, (found.options, made.files)
