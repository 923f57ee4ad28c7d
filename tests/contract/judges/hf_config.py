"""Builds causal language models of configurations without storage: parameters that transformers counts."""

import json
import sys

import torch
import transformers

for case in json.load(sys.stdin):
    values = dict(case)
    try:
        config = transformers.CONFIG_MAPPING[values.pop("model_type")](**values)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        print(json.dumps({"parameters": sum(one.numel() for one in model.parameters())}))
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"[:500]}))
