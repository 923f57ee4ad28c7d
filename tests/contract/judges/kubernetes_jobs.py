"""Manifests in front of Kubernetes' own schemas and of the classes that Kubeflow publishes for its kinds.

Reads [{"text": manifest}] and prints for each what is wrong, and what the classes read. Core kinds and every
pod template are held against Kubernetes' schema, unknown fields refused; a class drops what it does not know,
so that what it gives back must be all that went in.
"""

import json
import sys

import kubeflow_trainer_api.models as trainer
import kubernetes_validate
import yaml
from kubeflow.training import models as training

KUBERNETES = "1.34"
CLASSES = {"TrainJob": trainer.TrainerV1alpha1TrainJob, "JobSet": trainer.JobsetV1alpha2JobSet}


def core(document):
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except Exception as error:  # whatever it says of the document
        return [f"{document['kind']}: {getattr(error, 'message', None) or error}"[:300]]
    return []


def templates(node):
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "template" and {"containers", "volumes"} & set(value.get("spec") or {}):
                metadata = {"name": "pod", **value.get("metadata", {})}
                yield {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": value["spec"]}
            else:
                yield from templates(value)
    elif isinstance(node, list):
        for one in node:
            yield from templates(one)


def lost(given, back, path=""):
    if isinstance(given, dict):
        if not isinstance(back, dict):
            return [path]
        return [
            line
            for key, value in given.items()
            for line in ([f"{path}.{key}"] if key not in back else lost(value, back[key], f"{path}.{key}"))
        ]
    if isinstance(given, list):
        if not isinstance(back, list) or len(back) != len(given):
            return [path]
        return [line for i, one in enumerate(given) for line in lost(one, back[i], f"{path}[{i}]")]
    return [] if given == back else [f"{path}: {given!r} became {back!r}"]


def made_by_class(document):
    try:
        made = CLASSES[document["kind"]].from_dict(document)
    except Exception as error:
        return None, [str(error)[:300]]
    return made, lost(document, json.loads(json.dumps(made.to_dict(), default=str)))


def walked(name, value, path=""):
    """A value against a class of the training operator's, whose attributes say names and types."""
    kind = getattr(training, name, None)
    if name.startswith("list["):
        if not isinstance(value, list):
            return [f"{path} is no list"]
        return [line for one in value for line in walked(name[5:-1], one, f"{path}[]")]
    if name.startswith("dict("):
        return [
            line for k, v in value.items() for line in walked(name[5:-1].split(", ")[1], v, f"{path}.{k}")
        ]
    if kind is None:
        types = {"int": int, "str": str, "bool": bool}
        fits = name not in types or (
            isinstance(value, types[name]) and (name == "bool") == isinstance(value, bool)
        )
        return [] if fits else [f"{path} is {value!r}, not {name}"]
    known = {key: kind.openapi_types[attribute] for attribute, key in kind.attribute_map.items()}
    return [
        line
        for key, one in value.items()
        for line in (
            walked(known[key], one, f"{path}.{key}") if key in known else [f"{path}.{key} is not known"]
        )
    ]


def judge(text):
    errors, read = [], {}
    for document in yaml.load_all(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if document["apiVersion"] == "v1":
            errors += core(document)
            continue
        for pod in templates(document):
            errors += core(pod)
        if document["kind"] in CLASSES:
            made, wrong = made_by_class(document)
            errors += wrong
            if wrong:
                continue
            if document["kind"] == "TrainJob":
                read = {
                    "nodes": made.spec.trainer.num_nodes,
                    "processes": made.spec.trainer.num_proc_per_node,
                }
            else:
                job = made.spec.replicated_jobs[0].template.spec
                read = {"nodes": job.completions, "mode": job.completion_mode}
        elif document["kind"] == "PyTorchJob":
            wrong = walked("KubeflowOrgV1PyTorchJob", document)
            errors += wrong
            read = {} if wrong else {"processes": int(document["spec"]["nprocPerNode"])}
    return {"ok": not errors, "errors": errors[:5], **read}


for case in json.load(sys.stdin):
    print(json.dumps(judge(case["text"])), flush=True)
