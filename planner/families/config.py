"""Look-ups in a configuration that say what is missing, and the keys that most decoders share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from planner.errors import InputError
from planner.files import plain

Fields = dict[str, Any]
"""Values of :class:`planner.model.ModelSpec`."""

ATTENTIONS = {
    "full_attention": "full",
    "sliding_attention": "window",
    "chunked_attention": "window",  # of as many tokens at most
    "linear_attention": "delta",
}
"""Words of ``layer_types``, as mixers."""


class Config:
    """A configuration's keys. A key that is ``null`` counts as left out."""

    def __init__(self, data: Mapping[str, Any], origin: str) -> None:
        self.data, self.origin = data, origin

    @property
    def family(self) -> str:
        """The ``model_type``."""
        return str(self.data["model_type"])

    def need(self, *keys: str) -> Any:
        """The first of these keys that is there."""
        for key in keys:
            if self.data.get(key) is not None:
                return self.data[key]
        raise self.error(f"{' or '.join(keys)} is missing, which {self.family} needs")

    def integer(self, *keys: str, default: int | None = None, least: int = 1, most: int = 10**9) -> int:
        """A length. Raises InputError for what is none, or is missing without a default."""
        if default is not None and all(self.data.get(key) is None for key in keys):
            return default
        value = self.need(*keys)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            shown = plain(json.dumps(value, default=str), 50)
            raise self.error(f"{keys[0]}={shown} must be a whole number from {least} to {_power(most)}")
        return value

    def blocks(self, *keys: str) -> int:
        """The number of blocks."""
        return self.integer(*(keys or ("num_hidden_layers",)), most=10_000)

    def get(self, key: str, default: Any) -> Any:
        """A value, or the default of the family's configuration class."""
        value = self.data.get(key)
        return default if value is None else value

    def flag(self, key: str, default: bool = False) -> bool:
        """A value that is true or false."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(f"{key}={plain(str(value), 50)!r} must be true or false")
        return value

    def indices(self, key: str) -> frozenset[int]:
        """A list of blocks' numbers."""
        value = self.get(key, [])
        if not isinstance(value, list) or not all(isinstance(one, int) for one in value):
            raise self.error(f"{key} must be a list of blocks' numbers")
        return frozenset(value)

    def refuse_unless(self, key: str, allowed: tuple[Any, ...], default: Any) -> None:
        """Raises InputError for a variation that is not modelled."""
        if (value := self.get(key, default)) not in allowed:
            raise self.error(f"{key}={plain(repr(value), 50)} is not modelled; {key} must be {allowed[0]!r}")

    def error(self, problem: str) -> InputError:
        """What is wrong, with the file's name."""
        return InputError(f"{self.origin}: {problem}")

    def words(self, key: str, known: Mapping[str, str], count: int) -> tuple[str, ...] | None:
        """A list with one word for each of so many blocks, translated; None where there is none."""
        value = self.data.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or len(value) != count:
            raise self.error(f"{key} must name each of the {count} blocks")
        strange = next((str(one) for one in value if str(one) not in known), None)
        if strange is not None:
            raise self.error(f"{key}: {strange[:40]!r} is not modelled; known are {', '.join(known)}")
        return tuple(known[str(one)] for one in value)


def _power(most: int) -> str:
    return "10^9" if most == 10**9 else f"{most:,}"


def sizes(config: Config, hidden: int, heads: int, head_dim: int | None = None) -> Fields:
    """Lengths that every decoder has. ``head_dim`` is the family's own default."""
    given = config.get("head_dim", head_dim)
    if given is None and hidden % heads:
        raise config.error(f"{heads} heads do not divide hidden size {hidden}, and head_dim is missing")
    return {
        "model_type": config.family,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": given if given is not None else hidden // heads,
        "vocab_size": config.integer("vocab_size"),
    }


def decoder(
    config: Config,
    *,
    positions: int,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    act: str = "silu",
    tied: bool = False,
    rotary: float = 1.0,
) -> Fields:
    """The keys that most decoders name alike, with the defaults of the family's configuration class.

    ``kv_heads`` is what a left-out ``num_key_value_heads`` means (null always means one for each head).
    """
    heads = config.integer("num_attention_heads")
    kv = config.data.get("num_key_value_heads", kv_heads)
    return sizes(config, config.integer("hidden_size"), heads, head_dim) | {
        "num_hidden_layers": config.blocks(),
        "num_key_value_heads": heads if kv is None else kv,
        "intermediate_size": config.integer("intermediate_size"),
        "max_position_embeddings": config.get("max_position_embeddings", positions),
        "tie_word_embeddings": config.flag("tie_word_embeddings", tied),
        "hidden_act": config.get("hidden_act", act),
        "rotary_fraction": rotary_fraction(config, rotary),
        "attention_dropout": config.get("attention_dropout", 0.0),
    }


def rotary_fraction(config: Config, default: float) -> Any:
    """The part of a head that is rotated: a key of its own, or one of the rotary parameters."""
    parameters = config.get("rope_parameters", {})
    inner = parameters.get("partial_rotary_factor") if isinstance(parameters, dict) else None
    return config.get("partial_rotary_factor", default if inner is None else inner)


def attention_biases(config: Config, key: str = "attention_bias", default: bool = False) -> Fields:
    """One key for the biases of queries, keys, values and output."""
    bias = config.flag(key, default)
    return {"qkv_bias": bias, "attention_output_bias": bias}


def windows(config: Config, usual: Callable[[int], bool], window: int | None) -> Fields:
    """Which blocks see a window only: as ``layer_types`` says, or where ``usual`` holds of their number."""
    count = config.blocks()
    mixers = config.words("layer_types", ATTENTIONS, count)
    if mixers is None:
        mixers = tuple("window" if window and usual(i) else "full" for i in range(count))
    if "delta" in mixers:
        raise config.error(f"layer_types: linear_attention is not modelled in {config.family}")
    if "window" not in mixers:
        return {"sliding_window": None}
    if window is None:
        raise config.error("sliding_window is missing, which layer_types needs")
    return {"sliding_window": window, "mixers": mixers}


def every(step: int) -> Callable[[int], bool]:
    """Windows in all blocks but each ``step``-th."""
    return lambda block: (block + 1) % step != 0


def mixed(count: int, experts: Iterable[int]) -> tuple[str, ...]:
    """MLPs of so many blocks, of which these have experts."""
    chosen = frozenset(experts)
    return tuple("experts" if block in chosen else "dense" for block in range(count))
