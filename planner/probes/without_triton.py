"""Lets torchtitan be imported where Triton is not installed: its kernels are compiled, never run here."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from unittest.mock import MagicMock

import torch._dynamo
import torch._inductor.compile_fx  # noqa: F401 - PyTorch itself has to find none

if find_spec("triton") is None:
    for name in ("triton", "triton.language"):
        stub = MagicMock(name=name)
        stub.__spec__ = ModuleSpec(name, None)
        stub.__path__ = []
        sys.modules[name] = stub
