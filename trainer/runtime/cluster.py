"""Reads the cluster from the environment variables of the platform and checks it: the workers, and which one this is.

| platform           | variables; the first row that applies is used    | addresses of the workers, chief first   |
| ------------------ | ------------------------------------------------ | --------------------------------------- |
| Vertex AI, TFJob   | TF_CONFIG, if it has a cluster                   | its chief or master, then its worker    |
| Vertex AI          | CLUSTER_SPEC, if it has a cluster                | its workerpool0, then its workerpool1   |
| TrainJob           | TRAINER_HOSTS, TRAINJOB_NAME                     | <trainjob>-node-0-<i>.<trainjob>:<port> |
| JobSet             | TRAINER_HOSTS, JOBSET_NAME, REPLICATED_JOB_NAME, | <set>-<replicated job>-0-<i>.<set>:     |
|                    | JOB_INDEX                                        | <port>                                  |
| Indexed Job        | TRAINER_HOSTS, TRAINER_JOB, TRAINER_SERVICE      | <job>-<i>.<service>:<port>              |
| Slurm              | SLURM_JOB_ID, SLURM_STEP_NUM_TASKS,              | <node i>:<port + i>                     |
|                    | SLURM_STEP_NODELIST, SLURM_NODEID                |                                         |
| one host           | none of these                                    | none                                    |

Vertex AI and TFJob set their variables, Kubernetes sets the index <i>, JOB_COMPLETION_INDEX; the pod template sets the
rest. TRAINER_HOSTS is the Job's completions and parallelism: all hosts are pods of one Job, so a JobSet's replicated
job has one replica. Names come from labels (`fieldPath: metadata.labels['...']`): TRAINER_JOB from
batch.kubernetes.io/job-name; JOBSET_NAME and TRAINJOB_NAME from jobset.sigs.k8s.io/jobset-name; REPLICATED_JOB_NAME
from jobset.sigs.k8s.io/replicatedjob-name; JOB_INDEX from jobset.sigs.k8s.io/job-index. TRAINER_SERVICE, the headless
Service, also replaces the subdomain of a JobSet or TrainJob that has its own. TRAINER_PORT is 2222 unless set.
Exactly one of TRAINJOB_NAME, JOBSET_NAME and TRAINER_JOB is set, unless there is only one host.

Slurm's srun sets the variables of its step, one task per node. Those of the job (SLURM_NTASKS, SLURM_JOB_NODELIST) may
differ and do not count (tensorflow#36094). The first port is derived from SLURM_JOB_ID unless TRAINER_PORT is set; ports
are consecutive, because several slurmd may share one machine. Slurm selects the GPUs by CUDA_VISIBLE_DEVICES.

An incomplete configuration is a UserError: workers that each train alone would overwrite each other's files in job_dir.
The chief evaluates: an evaluator is not counted as a worker, and raises a UserError when it starts.
"""

import dataclasses
import itertools
import json
import re
import socket
import time
from collections.abc import Mapping
from typing import Any

from absl import logging

from trainer.errors import UserError

# Task type -> role in this job. On Vertex AI the position of a worker pool determines its role:
# https://cloud.google.com/vertex-ai/docs/training/distributed-training
_ROLES = {
    "TF_CONFIG": {"chief": "chief", "master": "chief", "worker": "worker", "ps": "ps", "evaluator": "evaluator"},
    "CLUSTER_SPEC": {"workerpool0": "chief", "workerpool1": "worker", "workerpool2": "ps", "workerpool3": "evaluator"},
}
_JOB_NAMES = ("TRAINJOB_NAME", "JOBSET_NAME", "TRAINER_JOB")  # the one that is set determines the kind of Job
_KUBERNETES = (
    "TRAINER_HOSTS",
    "TRAINER_SERVICE",
    "TRAINER_PORT",
    "TRAINJOB_NAME",
    "JOBSET_NAME",
    "TRAINER_JOB",
    "REPLICATED_JOB_NAME",
    "JOB_INDEX",
    "JOB_COMPLETION_INDEX",
)
_SLURM = (
    "SLURM_JOB_ID",
    "SLURM_JOB_NUM_NODES",
    "SLURM_PROCID",
    "SLURM_STEP_NUM_TASKS",
    "SLURM_STEP_NODELIST",
    "SLURM_NODEID",
    "SLURMD_NODENAME",
    "TRAINER_PORT",
)
_NODE_LIST = re.compile(r"[^\s,\[\]]*(?:\[[0-9]{1,6}(?:-[0-9]{1,6})?(?:,[0-9]{1,6}(?:-[0-9]{1,6})?)*\][^\s,\[\]]*)*")
_ADDRESS = re.compile(r"(\w[\w.-]*|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})", re.ASCII)  # host, port


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The training cluster as one of its workers sees it."""

    workers: int
    index: int  # of this worker; the chief is 0
    is_chief: bool
    addresses: tuple[str, ...]  # host:port of every worker, the chief first; empty for a single worker
    source: str  # the variable or kind of Job that it was read from


def resolve(environment: Mapping[str, str]) -> Cluster:
    """Returns this worker's view of the cluster; the table above lists the variables.

    Raises UserError where they are malformed, contradictory or incomplete, and in an evaluator.
    """
    for variable in _ROLES:
        if cluster := _from_json(variable, environment.get(variable, "").strip()):
            return cluster
    kubernetes = {name: environment.get(name, "").strip() for name in _KUBERNETES}
    if environment.get("SLURM_JOB_ID") and not any(kubernetes[name] for name in _KUBERNETES if name != "TRAINER_PORT"):
        return _from_slurm({name: environment.get(name, "").strip() for name in _SLURM})
    return _from_kubernetes(kubernetes)


def tensorflow_environment(cluster: Cluster) -> dict[str, str]:
    """Returns the environment variables for TensorFlow.

    TF_CONFIG has workers only, of which TensorFlow takes the first as the chief; for a single worker it is `{}`, so that
    TensorFlow does not wait for others. no_grpc_proxy lists the workers' hosts: gRPC would otherwise send what workers
    send each other to the proxy of http_proxy or https_proxy, which refuses it.
    """
    if cluster.workers == 1:
        return {"TF_CONFIG": "{}"}
    task = {"type": "worker", "index": cluster.index}
    hosts = [address.rpartition(":")[0].strip("[]") for address in cluster.addresses]
    return {
        "TF_CONFIG": json.dumps({"cluster": {"worker": list(cluster.addresses)}, "task": task}),
        "no_grpc_proxy": ",".join(hosts),
    }


def check_addresses(cluster: Cluster, *, timeout_secs: float) -> None:
    """Raises UserError unless this worker's port is free and the other host names resolve within the timeout.

    TensorFlow itself waits for an unreachable worker without logging anything.
    """
    if cluster.workers == 1:
        return
    port = int(cluster.addresses[cluster.index].rpartition(":")[2])
    with socket.socket() as probe:
        # As in gRPC: connections of an ended process (TIME_WAIT) do not block the port, a listener does.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise UserError(
                f"Port {port} of worker {cluster.index} (from {cluster.source}) cannot be opened: {error.strerror}. "
                "Expected a free port: stop the process that uses it, or choose another (TRAINER_PORT, or in the "
                "cluster)."
            ) from error
    deadline = time.monotonic() + timeout_secs
    for index, address in enumerate(cluster.addresses):
        if index != cluster.index:
            _wait_for_name(
                address.rpartition(":")[0].strip("[]"),
                worker=f"worker {index} (from {cluster.source})",
                deadline=deadline,
                timeout_secs=timeout_secs,
            )


def _from_json(variable: str, text: str) -> Cluster | None:
    """Returns the cluster in TF_CONFIG or CLUSTER_SPEC, or None if it has none."""
    try:
        spec = json.loads(text or "{}")
    except ValueError as error:
        raise UserError(f"{variable} is {text[:300]!r}; expected JSON ({error}): correct or unset it.") from error
    if not isinstance(spec, dict):
        raise UserError(f"{variable} is {text[:300]!r}; expected a JSON object: correct or unset it.")
    cluster, task = spec.get("cluster") or {}, spec.get("task") or {}
    received = f"{variable} has cluster {json.dumps(cluster)} and task {json.dumps(task)}"
    if not isinstance(cluster, dict) or not isinstance(task, dict):
        raise UserError(f"{received}; expected two JSON objects: correct or unset it.")
    roles, task_type = _ROLES[variable], str(task.get("type"))
    if roles.get(task_type) == "evaluator":
        raise UserError(f"{received}; the chief evaluates, so that no evaluator is needed: remove that replica.")
    if not cluster:
        # A TFJob with enableDynamicWorker writes sparseCluster instead, which lists only the worker itself.
        if "sparseCluster" in spec or str(task.get("index", 0)) != "0":
            raise UserError(
                f"{received}; expected a cluster of all workers: list them (TFJob: no enableDynamicWorker)."
            )
        return None
    if not set(cluster) <= set(roles) or not all(isinstance(addresses, list) for addresses in cluster.values()):
        raise UserError(f"{received}; expected lists of addresses under {', '.join(roles)} only: correct the others.")
    by_role: dict[str, list] = {role: [] for role in roles.values()}
    for name, role in roles.items():
        by_role[role] += cluster.get(name, [])
    if by_role["ps"] or roles.get(task_type) == "ps":
        raise UserError(
            f"{received}; this job uses neither parameter servers nor the Reduction Server of Vertex AI: remove these "
            "replicas (ps, worker pool 2) and use workers only."
        )
    if len(by_role["chief"]) > 1:
        raise UserError(f"{received}; expected one chief: make the others workers.")
    if not cluster.get(task_type):
        raise UserError(f"{received}; task.type is {task_type!r}, expected a type that has addresses in the cluster.")
    index = _parse_number("task.index", task.get("index"), low=0, high=len(cluster[task_type]) - 1, received=received)
    if roles[task_type] == "worker":
        index += len(by_role["chief"])
    return _make_cluster(by_role["chief"] + by_role["worker"], index=index, source=variable, received=received)


def _from_kubernetes(values: Mapping[str, str]) -> Cluster:
    """Returns the cluster of an Indexed Job, JobSet or TrainJob, or a single worker if there is none."""
    received = ", ".join(f"{name}={value!r}" for name, value in values.items() if value)
    index, names = values["JOB_COMPLETION_INDEX"], [name for name in _JOB_NAMES if values[name]]
    if not values["TRAINER_HOSTS"]:
        # Index 0 alone is an Indexed Job of one pod, or the first pod of several; each of the others raises here.
        if names or values["TRAINER_SERVICE"] or index not in ("", "0"):
            raise UserError(
                f"{received}; expected TRAINER_HOSTS too, because each pod would train alone on one job_dir: set it in "
                "the pod template to the Job's completions."
            )
        source = "an Indexed Job of one pod" if index else "no cluster"
        return _make_cluster([], index=0, source=source, received=received)
    workers = _parse_number("TRAINER_HOSTS", values["TRAINER_HOSTS"], low=1, high=1000, received=received)
    position = 0
    if workers > 1 or index:
        hint = ": give the Job completionMode Indexed, and TRAINER_HOSTS as its completions and parallelism"
        position = _parse_number("JOB_COMPLETION_INDEX", index, low=0, high=workers - 1, received=received, hint=hint)
    if values["JOBSET_NAME"] and values["JOB_INDEX"] != "0":
        raise UserError(
            f"{received}; expected JOB_INDEX='0', because all hosts are pods of one Job: give the replicated job one "
            "replica, with TRAINER_HOSTS as its completions and parallelism, and set JOB_INDEX from its label."
        )
    if workers == 1:
        return _make_cluster([], index=0, source="TRAINER_HOSTS", received=received)
    if len(names) != 1:
        raise UserError(
            f"{received}; expected exactly one of {', '.join(_JOB_NAMES)}: set the one of your kind of Job."
        )
    source, addresses = _kubernetes_addresses(values, job_name=names[0], workers=workers, received=received)
    return _make_cluster(addresses, index=position, source=source, received=received)


def _kubernetes_addresses(
    values: Mapping[str, str], *, job_name: str, workers: int, received: str
) -> tuple[str, list[str]]:
    """Returns the kind of Job, which the variable `job_name` determines, and the addresses of its pods."""
    name, service = values[job_name], values["TRAINER_SERVICE"]
    if job_name == "TRAINJOB_NAME":
        source, host, required = "TrainJob", f"{name}-node-0", "TRAINJOB_NAME"
    elif job_name == "JOBSET_NAME":
        source, host, required = "JobSet", f"{name}-{values['REPLICATED_JOB_NAME']}-0", "REPLICATED_JOB_NAME"
    else:
        source, host, required = "Indexed Job", name, "TRAINER_SERVICE"
    if not values[required]:
        raise UserError(f"{received}; expected {required} too: set it in the pod template.")
    # For a Service called trainer, Kubernetes sets TRAINER_PORT=tcp://... in every container of the namespace.
    hint = " (a Service called trainer sets it so: set it yourself)" if "tcp://" in values["TRAINER_PORT"] else ""
    port = _parse_number(
        "TRAINER_PORT", values["TRAINER_PORT"] or "2222", low=1, high=65535, received=received, hint=hint
    )
    return source, [f"{host}-{i}.{service or name}:{port}" for i in range(workers)]


def _from_slurm(values: Mapping[str, str]) -> Cluster:
    """Returns the cluster of the tasks of a Slurm step, or a single worker if srun did not start this process."""
    received = ", ".join(f"{name}={value!r}" for name, value in values.items() if value)
    if not values["SLURM_STEP_NUM_TASKS"]:
        # In a batch script, SLURM_PROCID is set without srun too; in a shell of salloc it is not.
        if values["SLURM_PROCID"] and values["SLURM_JOB_NUM_NODES"] not in ("", "1"):
            raise UserError(
                f"{received}; expected the variables of a step, because only the first node of the job would train: "
                "start the trainer with srun --ntasks-per-node=1, or request --nodes=1."
            )
        return _make_cluster([], index=0, source="a Slurm job without srun", received=received)
    workers = _parse_number("SLURM_STEP_NUM_TASKS", values["SLURM_STEP_NUM_TASKS"], low=1, high=1000, received=received)
    if workers == 1:
        return _make_cluster([], index=0, source="a Slurm step of one task", received=received)
    nodes = _expand_node_list(values["SLURM_STEP_NODELIST"], received=received)
    if len(nodes) != workers:
        raise UserError(
            f"{received}; expected one task per node, because the trainer uses all GPUs of its node: start it with srun "
            "--ntasks-per-node=1."
        )
    # SLURM_PROCID is in the order of --distribution, which may not be that of the node list.
    index = _parse_number("SLURM_NODEID", values["SLURM_NODEID"], low=0, high=workers - 1, received=received)
    if values["SLURMD_NODENAME"] not in ("", nodes[index]):
        raise UserError(
            f"{received}; expected node {index} of the list to be SLURMD_NODENAME: the variables are those of another "
            "step, from which this job was submitted: start the trainer with srun."
        )
    # Below the ephemeral ports, which begin at 32768. 16 apart, so that jobs on one node rarely choose the same ports.
    job = _parse_number("SLURM_JOB_ID", values["SLURM_JOB_ID"], low=1, high=2**32, received=received)
    port = _parse_number(
        "TRAINER_PORT", values["TRAINER_PORT"] or 10000 + job % 1250 * 16, low=1, high=65535, received=received
    )
    addresses = [f"{node}:{port + i}" for i, node in enumerate(nodes)]
    return _make_cluster(addresses, index=index, source="Slurm", received=received)


def _expand_node_list(text: str, *, received: str) -> list[str]:
    """Returns the names in a node list of Slurm: `rack[0-1]n[08-09],login` is rack0n08, rack0n09, rack1n08, ..., login."""
    names: list[str] = []
    for part in re.split(r",(?![^\[]*\])", text):  # at the commas outside of brackets
        if not part or not _NODE_LIST.fullmatch(part):
            raise UserError(f"{received}; {part!r} is not a node list of Slurm, expected names such as n[1-3,07]-ib.")
        pieces = re.split(r"\[(.*?)\]", part)  # text and ranges by turns
        choices = [_expand_ranges(piece) if i % 2 else [piece] for i, piece in enumerate(pieces)]
        names += ["".join(choice) for choice in itertools.product(*choices)]
    return names


def _expand_ranges(text: str) -> list[str]:
    """Returns the numbers of `1-3,07` with their leading zeros."""
    bounds = [(low, high or low) for low, _, high in (item.partition("-") for item in text.split(","))]
    return [f"{number:0{len(low)}d}" for low, high in bounds for number in range(int(low), int(high) + 1)]


def _make_cluster(addresses: list, *, index: int, source: str, received: str) -> Cluster:
    """Returns the cluster of these addresses. Raises UserError for one that is malformed or listed twice."""
    for address in addresses:
        match = _ADDRESS.fullmatch(str(address))
        if not match or not 1 <= int(match[2]) <= 65535:
            raise UserError(f"{received}; {address!r} is not an address, expected host:port: correct it.")
        if addresses.count(address) > 1:
            raise UserError(f"{received}; {address!r} is listed twice, expected one for each worker: correct it.")
    if len(addresses) < 2:
        return Cluster(workers=1, index=0, is_chief=True, addresses=(), source=source)
    return Cluster(workers=len(addresses), index=index, is_chief=index == 0, addresses=tuple(addresses), source=source)


def _parse_number(name: str, value: Any, *, low: int, high: int, received: str, hint: str = "") -> int:
    # Digits in quotes are valid: TensorFlow accepts them, and manifests that substitute a variable contain them.
    if not re.fullmatch(r"[0-9]{1,10}", str(value)) or not low <= int(value) <= high:
        raise UserError(f"{received}; {name} is {value!r}, expected a number from {low} to {high}{hint}.")
    return int(value)


def _wait_for_name(host: str, *, worker: str, deadline: float, timeout_secs: float) -> None:
    """Returns when the name resolves: Kubernetes publishes a pod's name some time after the pod starts."""
    is_logged = False
    while True:
        try:
            socket.getaddrinfo(host, None)
            return
        except (OSError, UnicodeError) as error:  # UnicodeError: a label of more than 63 characters
            remaining_secs = deadline - time.monotonic()
            if remaining_secs <= 0:
                raise UserError(
                    f"The name {host} of {worker} did not resolve in {timeout_secs:g} s: {error}. Expected a running "
                    "host: check that the names in the environment are right; on Kubernetes, that its pod is scheduled, "
                    "that the headless Service selects it and publishes not-ready addresses, and that the pod template's "
                    "subdomain is that Service."
                ) from error
        if not is_logged:
            logging.info("Waiting up to %.0f s for the name %s of %s.", remaining_secs, host, worker)
            is_logged = True
        time.sleep(min(1.0, remaining_secs))
