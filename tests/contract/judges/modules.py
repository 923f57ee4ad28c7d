"""Names of the products of a block in transformers' modules, of model types, on the meta device."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import warnings

os.environ["TRANSFORMERS_VERBOSITY"] = "error"
warnings.filterwarnings("ignore")
sys.path.pop(0)  # this folder, whose files have the names of the tools
with contextlib.redirect_stdout(io.StringIO()):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM


def products_of(kind: str) -> list[str]:
    config = AutoConfig.for_model(kind)
    for name in ("num_hidden_layers", "n_layer"):
        if hasattr(config, name):
            setattr(config, name, 1)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return [
        name
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and ".0." in name
    ]


def main() -> None:
    for kind in json.load(sys.stdin):
        try:
            print(json.dumps({"ok": True, "names": products_of(kind)}), flush=True)
        except Exception as error:
            print(json.dumps({"ok": False, "error": f"{type(error).__name__}: {error}"[:300]}), flush=True)


main()
