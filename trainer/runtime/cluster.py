"""Who am I among how many workers: reads what the platform says, and checks what it promised.

| platform           | variables; the first row that applies is taken   | addresses of the workers, chief first   |
| ------------------ | ------------------------------------------------ | --------------------------------------- |
| Vertex AI, TFJob   | TF_CONFIG, if it has a cluster                   | its chief or master, then its worker    |
| Vertex AI          | CLUSTER_SPEC, if it has a cluster                | its workerpool0, then its workerpool1   |
| TrainJob           | TRAINER_HOSTS, TRAINJOB_NAME                     | <trainjob>-node-0-<i>.<trainjob>:<port> |
| JobSet             | TRAINER_HOSTS, JOBSET_NAME, REPLICATED_JOB_NAME, | <set>-<replicated job>-0-<i>.<set>:     |
|                    | JOB_INDEX                                        | <port>                                  |
| Indexed Job        | TRAINER_HOSTS, TRAINER_JOB, TRAINER_SERVICE      | <job>-<i>.<service>:<port>              |
| one host           | none of these                                    | none                                    |

Vertex AI and TFJob set their variables, Kubernetes sets the index <i>, JOB_COMPLETION_INDEX; the pod template sets the
rest. TRAINER_HOSTS is the Job's completions and parallelism: all hosts are pods of one Job, so a JobSet's replicated
job has one replica. Names come from labels (`fieldPath: metadata.labels['...']`): TRAINER_JOB from
batch.kubernetes.io/job-name; JOBSET_NAME and TRAINJOB_NAME from jobset.sigs.k8s.io/jobset-name; REPLICATED_JOB_NAME
from jobset.sigs.k8s.io/replicatedjob-name; JOB_INDEX from jobset.sigs.k8s.io/job-index. TRAINER_SERVICE, the headless
Service, also replaces the subdomain of a JobSet or TrainJob that has its own. TRAINER_PORT is 2222 unless set.
Of TRAINJOB_NAME, JOBSET_NAME and TRAINER_JOB exactly one is set, unless there is but one host.

Workers that each train alone on one job_dir would spoil each other's files, so whatever is half said is a UserError.
The chief evaluates: an evaluator beside the workers is not counted, and ends with a UserError when it starts.
"""

import json
import re
import socket
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from absl import logging

from trainer.errors import UserError

# Task type -> role in this job. On Vertex a worker pool's position says its role:
# https://cloud.google.com/vertex-ai/docs/training/distributed-training
_ROLES = {
    "TF_CONFIG": {"chief": "chief", "master": "chief", "worker": "worker", "ps": "ps", "evaluator": "evaluator"},
    "CLUSTER_SPEC": {"workerpool0": "chief", "workerpool1": "worker", "workerpool2": "ps", "workerpool3": "evaluator"},
}


_JOB_NAMES = ("TRAINJOB_NAME", "JOBSET_NAME", "TRAINER_JOB")  # exactly one of them tells which kind of Job this is


_TRAINER_NAMES = ("TRAINER_HOSTS", "TRAINER_SERVICE", "TRAINER_PORT")


_KUBERNETES = (*_TRAINER_NAMES, *_JOB_NAMES, "REPLICATED_JOB_NAME", "JOB_INDEX", "JOB_COMPLETION_INDEX")


_ADDRESS = re.compile(r"(\w[\w.-]*|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})", re.ASCII)  # host, port


class Cluster(NamedTuple):
    """The training cluster as one of its workers sees it."""

    workers: int
    index: int  # type: ignore[assignment]  # mine; the chief is 0. Hides tuple.index, which nobody calls.
    is_chief: bool
    addresses: tuple[str, ...]  # host:port of every worker, the chief first; empty for a single worker
    source: str  # the convention it was read from


def resolve(environment: Mapping[str, str]) -> Cluster:
    """Returns this worker's view of the cluster; the table above says which variables are read.

    Raises UserError where they are malformed, contradict each other or leave something out, and in an evaluator.
    """
    for variable in _ROLES:
        if cluster := _from_json(variable, environment.get(variable, "").strip()):
            return cluster
    return _from_kubernetes({name: environment.get(name, "").strip() for name in _KUBERNETES})


def tf_config(cluster: Cluster) -> str:
    """Returns the TF_CONFIG for TensorFlow: workers only, of which it takes the first for chief.

    For a single worker it is `{}`, so that TensorFlow waits for nobody.
    """
    if cluster.workers == 1:
        return "{}"
    task = {"type": "worker", "index": cluster.index}
    return json.dumps({"cluster": {"worker": list(cluster.addresses)}, "task": task})


def check_addresses(cluster: Cluster, *, timeout_secs: float) -> None:
    """Raises UserError unless my port is free and every other worker's host name resolves within the timeout.

    TensorFlow itself would wait without a word for a worker that it cannot find.
    """
    if cluster.workers == 1:
        return
    port = int(cluster.addresses[cluster.index].rpartition(":")[2])
    with socket.socket() as probe:
        # As in gRPC: what a process that has ended leaves behind does not block the port, a listener does.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(
                f"Port {port} of worker {cluster.index} (from {cluster.source}) cannot be opened: {error.strerror}. "
                "Expected a free port: end what listens there, or choose another (TRAINER_PORT, or in the cluster)."
            ) from error
    deadline = time.monotonic() + timeout_secs
    for index, address in enumerate(cluster.addresses):
        if index != cluster.index:
            _wait_for_name(
                address.rpartition(":")[0].strip("[]"),
                f"worker {index} (from {cluster.source})",
                deadline,
                timeout_secs,
            )


def _from_json(variable: str, text: str) -> Cluster | None:
    """Returns what TF_CONFIG or CLUSTER_SPEC says, or None if it names no cluster."""
    try:
        spec = json.loads(text or "{}")
    except ValueError as error:
        raise UserError(f"{variable} is {text[:300]!r}; expected JSON ({error}): mend or unset it.") from error
    if not isinstance(spec, dict):
        raise UserError(f"{variable} is {text[:300]!r}; expected a JSON object: mend or unset it.")
    cluster, task = spec.get("cluster") or {}, spec.get("task") or {}
    came = f"{variable} has cluster {json.dumps(cluster)} and task {json.dumps(task)}"
    if not isinstance(cluster, dict) or not isinstance(task, dict):
        raise UserError(f"{came}; expected two JSON objects: mend or unset it.")
    roles, mine = _ROLES[variable], str(task.get("type"))
    if roles.get(mine) == "evaluator":
        raise UserError(f"{came}; this job evaluates on its own chief, no evaluator is needed: remove that replica.")
    if not cluster:
        # A TFJob with enableDynamicWorker writes sparseCluster instead, in which a worker finds only itself.
        if "sparseCluster" in spec or str(task.get("index", 0)) != "0":
            raise UserError(f"{came}; expected a cluster of all workers: list them (TFJob: no enableDynamicWorker).")
        return None
    if not set(cluster) <= set(roles) or not all(isinstance(addresses, list) for addresses in cluster.values()):
        raise UserError(f"{came}; expected lists of addresses under {', '.join(roles)} only: mend the others.")
    by_role: dict[str, list] = {role: [] for role in roles.values()}
    for name, role in roles.items():
        by_role[role] += cluster.get(name, [])
    if by_role["ps"] or roles.get(mine) == "ps":
        raise UserError(
            f"{came}; parameter servers are not used by this job, nor is Vertex' Reduction Server: "
            "remove these replicas (ps, worker pool 2) and let workers do all the work."
        )
    if len(by_role["chief"]) > 1:
        raise UserError(f"{came}; expected one chief: make the others workers.")
    if not cluster.get(mine):
        raise UserError(f"{came}; task.type is {mine!r}, expected a type that has addresses in the cluster: mend it.")
    index = _number("task.index", task.get("index"), 0, len(cluster[mine]) - 1, came)
    index += len(by_role["chief"]) if roles[mine] == "worker" else 0
    return _cluster(by_role["chief"] + by_role["worker"], index, variable, came)


def _from_kubernetes(values: Mapping[str, str]) -> Cluster:
    """Returns what an Indexed Job, JobSet or TrainJob says, a single worker if there is none."""
    came = ", ".join(f"{name}={value!r}" for name, value in values.items() if value)
    index, names = values["JOB_COMPLETION_INDEX"], [name for name in _JOB_NAMES if values[name]]
    if not values["TRAINER_HOSTS"]:
        # Index 0 alone is an Indexed Job of one pod, or the first of several, of which the others end here.
        if names or values["TRAINER_SERVICE"] or index not in ("", "0"):
            raise UserError(
                f"{came}; expected TRAINER_HOSTS too, as each pod would train alone on one job_dir: set it in the pod "
                "template to the Job's completions."
            )
        return _cluster([], 0, "an Indexed Job of one pod" if index else "no cluster", came)
    workers = _number("TRAINER_HOSTS", values["TRAINER_HOSTS"], 1, 1000, came)
    position = 0
    if workers > 1 or index:
        hint = ": give the Job completionMode Indexed, and TRAINER_HOSTS as its completions and parallelism"
        position = _number("JOB_COMPLETION_INDEX", index, 0, workers - 1, came, hint)
    if values["JOBSET_NAME"] and values["JOB_INDEX"] != "0":
        raise UserError(
            f"{came}; expected JOB_INDEX='0', as all hosts are pods of one Job: give the replicated job one replica, "
            "with TRAINER_HOSTS as its completions and parallelism, and set JOB_INDEX from its label."
        )
    if workers == 1:
        return _cluster([], 0, "TRAINER_HOSTS", came)
    if len(names) != 1:
        raise UserError(f"{came}; expected exactly one of {', '.join(_JOB_NAMES)}: set the one of your kind of Job.")
    name, service = values[names[0]], values["TRAINER_SERVICE"]
    if names[0] == "TRAINJOB_NAME":
        source, host, needed = "TrainJob", f"{name}-node-0", "TRAINJOB_NAME"
    elif names[0] == "JOBSET_NAME":
        source, host, needed = "JobSet", f"{name}-{values['REPLICATED_JOB_NAME']}-0", "REPLICATED_JOB_NAME"
    else:
        source, host, needed = "Indexed Job", name, "TRAINER_SERVICE"
    if not values[needed]:
        raise UserError(f"{came}; expected {needed} too: set it in the pod template.")
    # Kubernetes puts TRAINER_PORT=tcp://... into every container beside a Service called trainer.
    hint = " (a Service called trainer sets it so: set it yourself)" if "tcp://" in values["TRAINER_PORT"] else ""
    port = _number("TRAINER_PORT", values["TRAINER_PORT"] or "2222", 1, 65535, came, hint)
    return _cluster([f"{host}-{i}.{service or name}:{port}" for i in range(workers)], position, source, came)


def _cluster(addresses: list, index: int, source: str, came: str) -> Cluster:
    for address in addresses:
        match = _ADDRESS.fullmatch(str(address))
        if not match or not 1 <= int(match[2]) <= 65535:
            raise UserError(f"{came}; {address!r} is no address, expected host:port: mend it.")
        if addresses.count(address) > 1:
            raise UserError(f"{came}; {address!r} is there twice, expected one for each worker: mend it.")
    if len(addresses) < 2:
        return Cluster(1, 0, True, (), source)
    return Cluster(len(addresses), index, index == 0, tuple(addresses), source)


def _number(name: str, value: Any, lowest: int, highest: int, came: str, hint: str = "") -> int:
    # Digits in quotes count: TensorFlow takes them, and manifests that substitute a variable write them.
    if not re.fullmatch(r"[0-9]{1,9}", str(value)) or not lowest <= int(value) <= highest:
        raise UserError(f"{came}; {name} is {value!r}, expected a number from {lowest} to {highest}{hint}.")
    return int(value)


def _wait_for_name(host: str, whose: str, deadline: float, timeout_secs: float) -> None:
    """Returns once the name resolves: Kubernetes publishes a pod's name some time after the pod starts."""
    is_logged = False
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except (OSError, UnicodeError) as error:  # UnicodeError: a label of more than 63 characters
            remaining_secs = deadline - time.monotonic()
            if remaining_secs <= 0:
                raise UserError(
                    f"The name {host} of {whose} did not resolve in {timeout_secs:g} s: {error}. Expected a running "
                    "host: see whether its pod is scheduled, the headless Service selects it and publishes not-ready "
                    "addresses, the pod template's subdomain is that Service, and the environment's names are right."
                ) from error
        if not is_logged:
            logging.info("Waiting up to %.0f s for the name %s of %s.", remaining_secs, host, whose)
            is_logged = True
        time.sleep(min(1.0, remaining_secs))
