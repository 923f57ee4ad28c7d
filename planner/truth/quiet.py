"""What torch and transformers say about a run that only its bytes are wanted of, named one by one."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

HARMLESS = (
    "FSDP2-wrapped module .* returned a view tensor",  # OPT's layers end in a view; nothing writes to it
)
"""Beginnings of warnings."""


@contextmanager
def only_errors() -> Iterator[None]:
    """transformers logs errors alone, and the harmless warnings are not shown."""
    import transformers  # noqa: F401 - importing it sets its logger's level

    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for message in HARMLESS:
                warnings.filterwarnings("ignore", message=message)
            yield
    finally:
        logger.setLevel(level)
