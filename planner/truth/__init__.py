"""Real PyTorch as the judge: what real modules keep, counted on tensors without storage.

Needs the optional extra ``truth`` (torch and transformers); nothing else in the planner imports it.
No GPU, no network and no memory for the model are needed: tensors are fake CUDA tensors, which have
shapes and storages but no bytes.
"""
