"""Modules of an extra that is not installed are left out of the doctests."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("torch") and find_spec("transformers") else ["planner/truth/*.py"]
