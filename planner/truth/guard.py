"""Lets a CPU-only PyTorch run autograd on fake CUDA tensors.

A backward pass asks the device for its current stream, and the CPU wheel has no CUDA device to ask.
Two C++ objects are given answers, through pointers to them that the libraries export:

- the *device guard* of CUDA becomes a copy of the meta device's (all no-ops) whose streams are the
  default stream of ``cuda:0`` and whose events do nothing;
- the *hooks* of CUDA say that it is built and has a context. Nothing else about them changes:
  ``torch.cuda.is_available()`` stays false, and real CUDA memory can still not be had.

Both are methods tables of the Itanium C++ ABI (Linux, macOS); slots are counted in the order of the
virtual functions in ``c10/core/impl/DeviceGuardImplInterface.h`` and
``ATen/detail/AcceleratorHooksInterface.h`` of the release that the extra pins.

Both outlive the interpreter, and so do the tables: the hooks' destructor is called through theirs
when the process exits, after Python has freed its objects.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
from pathlib import Path

import torch

from planner.errors import InputError

CUDA, META = 1, 14
"""c10::DeviceType."""

# ``c10::Stream{Device{CUDA, 0}, id 0}`` in the two registers that it is returned in.
_RETURN_DEFAULT_STREAM = {
    "x86_64": bytes.fromhex("b801000000 31d2 c3"),  # mov eax, 1; xor edx, edx; ret
    "aarch64": bytes.fromhex("200080d2 010080d2 c0035fd6"),  # mov x0, #1; mov x1, #0; ret
}
_GUARD_SLOTS, _HOOK_SLOTS = 40, 96  # more than either table has
_STREAM_SLOTS = (5, 6, 7, 8, 9)  # getStream ... exchangeStream
_EVENT_SLOTS = (11, 12, 13, 14)  # destroyEvent, record, block, queryEvent
_TYPE_SLOT = 0
_BUILT_SLOT, _CONTEXT_SLOT = 2, 4  # isBuilt, hasPrimaryContext, after two destructors

# Operators of a CUDA build that a CPU wheel replaces by their formula, one temporary per operation.
# A kernel for the key keeps them whole; a fake tensor takes only their shapes.
_WHOLE_ON_CUDA = ("silu_backward", "mish_backward")

_kept: list[object] = []


def _keep(*things: object) -> None:
    """Keeps objects that C++ points to for as long as the process lives: Python never frees them."""
    for thing in things:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))
    _kept.extend(things)


def _copy_of_table(address: int, slots: int) -> ctypes.Array[ctypes.c_void_p]:
    """A methods table with its two words of type information before it."""
    table = ctypes.c_void_p.from_address(address).value or 0
    before = 2 * ctypes.sizeof(ctypes.c_void_p)
    original = (ctypes.c_void_p * (slots + 2)).from_address(table - before)
    return (ctypes.c_void_p * (slots + 2))(*original)


def _first_slot(table: ctypes.Array[ctypes.c_void_p]) -> int:
    return ctypes.addressof(table) + 2 * ctypes.sizeof(ctypes.c_void_p)


def _stream_code() -> int:
    """The address of a function that returns the default stream of ``cuda:0``."""
    code = _RETURN_DEFAULT_STREAM.get(platform.machine())
    if code is None:
        raise InputError(
            f"measuring on {platform.machine()}: the stand-in for a CUDA device is written for "
            f"{' and '.join(_RETURN_DEFAULT_STREAM)} only; use a machine with such a processor"
        )
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    view = ctypes.c_char.from_buffer(page)
    _keep(page, view)
    return ctypes.addressof(view)


def _library(name: str) -> ctypes.CDLL:
    folder = Path(torch.__path__[0]) / "lib"
    found = sorted(folder.glob(f"lib{name}.*"))
    if not found:
        raise InputError(f"measuring: lib{name} is not in {folder}; use Linux or macOS")
    return ctypes.CDLL(str(found[0]))


def install() -> None:
    """Makes autograd on fake CUDA tensors possible in this process. Does nothing if it already is."""
    if _kept or torch.cuda.is_available():
        return
    core, cpu = _library("c10"), _library("torch_cpu")
    yes = ctypes.cast(ctypes.pythonapi.Py_IsInitialized, ctypes.c_void_p).value  # returns 1
    stream = _stream_code()
    registry = (ctypes.c_void_p * (META + 1)).in_dll(core, "_ZN3c104impl26device_guard_impl_registryE")
    guard = _copy_of_table(registry[META] or 0, _GUARD_SLOTS)
    guard[2 + _TYPE_SLOT] = yes  # 1 is CUDA
    for slot in _EVENT_SLOTS:
        guard[2 + slot] = yes
    for slot in _STREAM_SLOTS:
        guard[2 + slot] = stream
    instance = ctypes.c_void_p(_first_slot(guard))
    register = core["_ZN3c104impl19registerDeviceGuardENS_10DeviceTypeEPKNS0_24DeviceGuardImplInterfaceE"]
    register.argtypes, register.restype = [ctypes.c_int8, ctypes.c_void_p], None
    register(CUDA, ctypes.addressof(instance))
    get_hooks = cpu["_ZN2at6detail12getCUDAHooksEv"]
    get_hooks.restype = ctypes.c_void_p
    hooks = get_hooks()
    table = _copy_of_table(hooks, _HOOK_SLOTS)
    table[2 + _BUILT_SLOT] = table[2 + _CONTEXT_SLOT] = yes
    ctypes.c_void_p.from_address(hooks).value = _first_slot(table)
    kernels = torch.library.Library("aten", "IMPL")
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in _WHOLE_ON_CUDA:
        if not has_kernel(f"aten::{name}", "CUDA"):
            kernels.impl(name, _never_run, "CUDA")
    _keep(guard, instance, table)
    _kept.append(kernels)


def _never_run(*_: object) -> None:
    raise AssertionError("there is no CUDA device: only fake tensors can be on it")
