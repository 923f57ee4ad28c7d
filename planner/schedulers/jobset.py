"""JobSet (jobset.x-k8s.io/v1alpha2): one indexed Job whose pods find each other by name.

The rank of a node is the index of its pod (``JOB_COMPLETION_INDEX``), rendezvous is at pod 0 under the name
that the headless service gives it: ``NAME-worker-0-0.NAME`` (jobset 0.12.0, api/jobset/v1alpha2).
"""

from __future__ import annotations

from collections.abc import Mapping

from planner.export.base import Export, Shell, Subject
from planner.schedulers import kueue
from planner.schedulers.pods import SETTINGS as PODS
from planner.schedulers.pods import Pods, count_of, finished

API = "jobset.x-k8s.io/v1alpha2"
SETTINGS = {
    **PODS,
    **kueue.SETTINGS,
    "restarts": "how often the job starts anew after a failure, 0 by default",
}
TASK = "worker"


def export(subject: Subject, made: Export, settings: Mapping[str, str]) -> Export:
    """A JobSet. Raises NotExpressible, InputError."""
    pods = Pods(subject, made, settings)
    command = pods.command(Shell("$(JOB_COMPLETION_INDEX)"), f"{pods.name}-{TASK}-0-0.{pods.name}")
    job = {
        "completionMode": "Indexed",
        "parallelism": pods.nodes,
        "completions": pods.nodes,
        "backoffLimit": 0,
        "template": pods.template(pods.container(TASK, command), kueue.together(pods), restartPolicy="Never"),
    }
    spec = {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        "failurePolicy": {"maxRestarts": count_of(settings, "restarts", "0")},
        "replicatedJobs": [{"name": TASK, "replicas": 1, "template": {"spec": job}}],
    }
    whole = pods.document(API, "JobSet", kueue.labels(pods), spec)
    documents = [pods.config_map(), whole]
    return finished(pods, "jobset", documents, kueue.setup(pods), *kueue.notes(pods))
