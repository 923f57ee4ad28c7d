"""Profiles: what lies outside tensors on somebody's own machines, as a small JSON file.

``planner calibrate`` writes one, the other commands take it with ``--profile``. A profile comes from
elsewhere, so it is size-bounded, parsed as JSON and held against :class:`planner.specs.Profile`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from planner.errors import InputError
from planner.files import content, reason_of, write_whole

if TYPE_CHECKING:
    from planner.specs import Profile

MAX_BYTES = 1_000_000
MOST_SLACK = 10.0  # reserved over allocated, less one; beyond it somebody wrote bytes
LEAST_BYTES = 4096  # of a context or communicator; below it somebody wrote GiB


def read_profile(path: str | PathLike[str]) -> Profile:
    """A profile that ``planner calibrate`` wrote. Raises InputError with the file and the field."""
    from pydantic import ValidationError

    from planner.specs import Profile, first_problem

    file = Path(path)
    try:
        data = content(file, MAX_BYTES, "profile")
    except InputError as error:
        raise InputError(f"profile {error}; planner calibrate writes one") from None
    try:
        profile = Profile.model_validate_json(data, strict=True)
    except ValidationError as error:
        raise InputError(f"{file} is not a profile of planner calibrate: {first_problem(error)}") from None
    _check(profile, f"profile {file}")
    return profile


def _check(profile: Profile, what: str) -> None:
    """Units that cannot be, which the fields' own bounds do not see."""
    if not profile.overheads:
        raise InputError(f"{what}: overheads is empty: it must hold context, communicator or allocator")
    figures = profile.overheads.values()
    for text in (profile.framework, profile.gpu, *profile.notes, *(figure.source for figure in figures)):
        if text and not text.isprintable():
            raise InputError(f"{what}: {text[:60]!r}: text that cannot be shown")
    for name, figure in profile.overheads.items():
        if name == "allocator" and figure.most > MOST_SLACK:
            raise InputError(
                f"{what}: overheads.allocator.most={figure.most:g}: a fraction is meant, as in 0.05"
            )
        if name != "allocator" and 0 < figure.most < LEAST_BYTES:
            raise InputError(f"{what}: overheads.{name}.most={figure.most:g}: bytes are meant, not GiB")


def refuse_output(path: Path, inputs: Iterable[Path], force: bool) -> None:
    """Raises InputError where a profile must not or cannot be written."""
    shown = f"--output {str(path)[:200]!r}"
    try:
        if path.is_dir():
            raise InputError(f"{shown} is a folder: name a file in it, as in {path / 'profile.json'}")
        if not path.parent.is_dir():
            raise InputError(f"{shown}: the folder {path.parent} does not exist")
        if any(file.exists() and path.exists() and file.samefile(path) for file in inputs):
            raise InputError(f"{shown} is one of the files to read: name another")
        if os.path.lexists(path):
            if not force:
                raise InputError(f"{shown} exists: name another file, or replace it with --force")
            if path.exists() and not path.is_file():
                raise InputError(f"{shown} is not a regular file: name another")
    except (OSError, ValueError) as error:
        raise InputError(f"{shown} cannot be written: {reason_of(error)}") from None


def write_profile(profile: Profile, path: Path, force: bool = False) -> None:
    """Writes a profile, whole or not at all: to a new file beside it, which then takes its name.

    Raises InputError if it cannot be written, or exists and ``force`` is not given.
    """
    refuse_output(path, (), force)
    text, shown = profile.model_dump_json(indent=1) + "\n", f"--output {str(path)[:200]!r}"
    write_whole(path, text, shown, "profile.json", lambda: refuse_output(path, (), force))
