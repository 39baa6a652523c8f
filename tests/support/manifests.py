"""Kubernetes manifests as a cluster sees them: rendered, validated, with the arguments and environment of each pod.

The checks and their sources:
  fields and types of built-in kinds          kubernetes-validate, strict: unknown fields are rejected
  fields and types of JobSet, TrainJob, ...   tests/deploy/schemas, closed JSON schemas of their CRDs with the CEL rules
  everything else                             the rules below: enums, quantities, references to missing names, unknown
                                              kinds, the Pod Security profile `restricted`
"""

import copy
import dataclasses
import functools
import itertools
import json
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.paths import ROOT

KUBERNETES = ROOT / "deploy" / "kubernetes"
SCHEMAS = ROOT / "tests" / "deploy" / "schemas"
KUBERNETES_VERSION = "1.37"

# https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity
_QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?")
_QUANTITIES = {"limits", "requests", "sizeLimit", "nominalQuota", "borrowingLimit"}
# (parent field, field) -> the values that the API server accepts; the JSON schemas accept any string.
_ENUMS = {
    ("spec", "completionMode"): {"Indexed", "NonIndexed"},
    ("spec", "podReplacementPolicy"): {"Failed", "TerminatingOrFailed"},
    ("spec", "restartPolicy"): {"Never", "OnFailure", "Always"},
    ("spec", "dnsPolicy"): {"ClusterFirst", "ClusterFirstWithHostNet", "Default", "None"},
    ("spec", "accessModes"): {"ReadWriteOnce", "ReadWriteMany", "ReadOnlyMany", "ReadWriteOncePod"},
    ("spec", "policyTypes"): {"Ingress", "Egress"},
    ("spec", "type"): {"ClusterIP", "NodePort", "LoadBalancer", "ExternalName"},
    ("podFailurePolicy.rules", "action"): {"FailJob", "FailIndex", "Ignore", "Count"},
    ("onExitCodes", "operator"): {"In", "NotIn"},
    ("onPodConditions", "status"): {"True", "False", "Unknown"},
    ("onPodConditions", "type"): {"DisruptionTarget"},
    ("failurePolicy.rules", "action"): {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"},
    ("failurePolicy.rules", "onJobFailureReasons"): {
        "BackoffLimitExceeded",
        "DeadlineExceeded",
        "FailedIndexes",
        "MaxFailedIndexesExceeded",
        "PodFailurePolicy",
    },
    ("tolerations", "operator"): {"Exists", "Equal"},
    ("tolerations", "effect"): {"NoSchedule", "PreferNoSchedule", "NoExecute"},
    ("seccompProfile", "type"): {"RuntimeDefault", "Localhost", "Unconfined"},
    ("securityContext", "fsGroupChangePolicy"): {"OnRootMismatch", "Always"},
    ("emptyDir", "medium"): {"", "Memory", "HugePages"},
    ("containers", "imagePullPolicy"): {"Always", "IfNotPresent", "Never"},
    ("ports", "protocol"): {"TCP", "UDP", "SCTP"},
    ("runPolicy", "cleanPodPolicy"): {"None", "Running", "All"},
    ("Chief", "restartPolicy"): {"ExitCode", "Never", "OnFailure", "Always"},
    ("Worker", "restartPolicy"): {"ExitCode", "Never", "OnFailure", "Always"},
    ("runtimeRef", "kind"): {"TrainingRuntime", "ClusterTrainingRuntime"},
}
# The built-in kinds in use; the other kinds are those of tests/deploy/schemas.
_BUILT_IN_KINDS = {
    "ConfigMap",
    "Job",
    "Namespace",
    "NetworkPolicy",
    "PersistentVolumeClaim",
    "Service",
    "ServiceAccount",
}


@dataclasses.dataclass(frozen=True)
class Pods:
    """The pods of one template, with what the platform adds to them."""

    name: str  # of the Job, JobSet, ... that they belong to
    count: int
    is_indexed: bool
    labels: dict[str, str]  # of the platform and of the template
    template: dict[str, Any]
    hosts: tuple[str, ...]  # the DNS name of each pod; empty if they have none
    platform: list[dict[str, str]]  # the variables that the platform sets in each pod

    @property
    def spec(self) -> dict[str, Any]:
        """The spec of a pod."""
        return self.template["spec"]

    @property
    def container(self) -> dict[str, Any]:
        """The only container."""
        (container,) = self.spec["containers"]
        return container


@functools.cache
def _kubectl() -> str:
    beside_python = pathlib.Path(sys.executable).parent / "kubectl"  # `make test` installs it
    program = str(beside_python) if beside_python.exists() else shutil.which("kubectl")
    if not program:
        pytest.skip("no kubectl: `make test` extracts it from a package; or put one on the PATH")
    return program


@functools.cache
def rendered_text(name: str) -> str:
    """The output of `kubectl kustomize deploy/kubernetes/NAME`."""
    kubectl = subprocess.run([_kubectl(), "kustomize", str(KUBERNETES / name)], capture_output=True, text=True)
    assert kubectl.returncode == 0, f"{name}: {kubectl.stderr}"
    return kubectl.stdout


def render(name: str) -> list[dict[str, Any]]:
    """The resources that `kubectl kustomize deploy/kubernetes/NAME` prints, as a new copy."""
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed: pip install '.[dev]'")
    return list(yaml.safe_load_all(rendered_text(name)))


def problems(resources: list[dict[str, Any]]) -> list[str]:
    """All problems of the resources; empty if they are valid."""
    errors = []
    for resource in resources:
        where = f"{resource['kind']} {resource['metadata']['name']}"
        errors += [f"{where}: {problem}" for problem in [*schema_problems(resource), *_value_problems(resource)]]
        for pods in pods_of(resource, resources):
            errors += [f"{where}: {problem}" for problem in _pod_problems(pods, resource, resources)]
    return errors


def schema_problems(resource: dict[str, Any]) -> Iterator[str]:
    """Unknown fields, wrong types and violated CEL rules of one resource."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="not installed: pip install '.[dev]'")
    jsonschema = pytest.importorskip("jsonschema", reason="not installed: pip install '.[dev]'")
    path = SCHEMAS / f"{resource['apiVersion'].replace('/', '_')}_{resource['kind']}.json"
    if path.exists():
        schema = _schema(path)
        errors = list(jsonschema.Draft202012Validator(schema).iter_errors(resource))
        yield from (f"{error.json_path}: {error.message[:200]}" for error in errors)
        if not errors:  # the rules assume the types
            complete = copy.deepcopy(resource)
            _apply_defaults(schema, complete)
            yield from _rule_problems(schema, complete, "$")
            if resource["kind"] == "Experiment":  # the cluster validates its content only when a trial starts
                yield from (f"trialSpec: {problem}" for problem in schema_problems(trial_job(resource)))
        return
    if resource["kind"] not in _BUILT_IN_KINDS:
        yield "unknown kind"
        return
    try:
        kubernetes_validate.validate(resource, KUBERNETES_VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{error.json_path}: {error.message[:200]}"
    except kubernetes_validate.SchemaNotFoundError as error:  # kubernetes-validate itself only warns
        yield error.message


@functools.cache
def _schema(path: pathlib.Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def _apply_defaults(schema: dict[str, Any], value: Any) -> None:
    """Fills in the defaults of the CRD, as the API server does before it evaluates the rules."""
    if isinstance(value, dict):
        for name, field in schema.get("properties", {}).items():
            if name not in value and "default" in field:
                value[name] = copy.deepcopy(field["default"])
            if name in value:
                _apply_defaults(field, value[name])
    elif isinstance(value, list):
        for item in value:
            _apply_defaults(schema.get("items", {}), item)


def _rule_problems(schema: dict[str, Any], value: Any, path: str) -> Iterator[str]:
    """The CEL rules of the CRD that the value violates, except those that compare it with its older version."""
    cel = pytest.importorskip("cel", reason="common-expression-language is not installed: pip install '.[dev]'")
    for rule in schema.get("x-kubernetes-validations", []):
        if "oldSelf" not in rule["rule"] and cel.evaluate(rule["rule"], {"self": value}) is not True:
            yield f"{path}: {rule.get('message', rule['rule'])}"
    if isinstance(value, dict):
        additional = schema.get("additionalProperties")
        for name, item in value.items():
            field = schema.get("properties", {}).get(name) or (additional if isinstance(additional, dict) else None)
            if field:
                yield from _rule_problems(field, item, f"{path}.{name}")
    elif isinstance(value, list) and "items" in schema:
        for i, item in enumerate(value):
            yield from _rule_problems(schema["items"], item, f"{path}[{i}]")


def _value_problems(value: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Invalid enum values and quantities, for which the JSON schemas of Kubernetes accept any string."""
    if isinstance(value, list):
        for item in value:
            yield from _value_problems(item, path)
        return
    if not isinstance(value, dict):
        return
    for name, item in value.items():
        if name in _QUANTITIES:
            for quantity in item.values() if isinstance(item, dict) else [item]:
                if not _QUANTITY.fullmatch(str(quantity)):
                    yield f"{'.'.join((*path, name))}: {quantity!r} is not a quantity"
        for parent in (".".join(path[-2:]), *path[-1:]):
            allowed = _ENUMS.get((parent, name))
            for choice in item if isinstance(item, list) else [item]:
                if allowed and isinstance(choice, str) and choice not in allowed:
                    yield f"{'.'.join((*path, name))}: {choice!r}, expected one of {sorted(allowed)}"
        yield from _value_problems(item, (*path, name))


def _pod_problems(pods: Pods, owner: dict[str, Any], resources: list[dict[str, Any]]) -> Iterator[str]:
    """References to missing names, numbers that differ, and violations of the profile `restricted`."""
    spec, container = pods.spec, pods.container
    existing = {(resource["kind"], resource["metadata"]["name"]) for resource in resources}
    referenced = [("ServiceAccount", spec.get("serviceAccountName"))]
    referenced += [("ConfigMap", source["configMapRef"]["name"]) for source in container.get("envFrom", [])]
    referenced += [
        ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"])
        for volume in spec["volumes"]
        if "persistentVolumeClaim" in volume
    ]
    referenced += [("Service", spec["subdomain"])] if "subdomain" in spec else []
    yield from (f"{kind} {name} is referenced but missing" for kind, name in referenced if (kind, name) not in existing)
    namespaces = {r["metadata"].get("namespace") for r in resources if r["kind"] not in ("Namespace", "ResourceFlavor")}
    if len(namespaces) != 1:
        yield f"namespaces {namespaces}, expected one"
    volumes = {item["name"] for item in spec["volumes"]}
    mounts = {item["name"] for item in container["volumeMounts"]}
    if mounts != volumes:
        yield f"the volumes are {sorted(volumes)}, but {sorted(mounts)} are mounted"
    for path in ("/tmp", "/dev/shm"):
        if path not in {mount["mountPath"] for mount in container["volumeMounts"]}:
            yield f"nothing is mounted at {path}"
    for name in _named_containers(owner):
        if name != container["name"]:
            yield f"podFailurePolicy refers to the container {name}, but its name is {container['name']}"
    for name, limit in container["resources"]["limits"].items():
        request = container["resources"]["requests"].get(name, limit)
        if request != limit:  # GPUs and memory must not be overcommitted
            yield f"the request of {name} is {request}, but the limit is {limit}"
    if "nvidia.com/gpu" in container["resources"]["limits"] and "--require_gpu" not in container["args"]:
        yield "the pod requests a GPU, but the job runs without one too: add --require_gpu"
    yield from _restricted_problems(spec, container)


def _named_containers(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if "onExitCodes" in value:
            yield value["onExitCodes"].get("containerName", "")
        for item in value.values():
            yield from _named_containers(item)
    elif isinstance(value, list):
        for item in value:
            yield from _named_containers(item)


def _restricted_problems(spec: dict[str, Any], container: dict[str, Any]) -> Iterator[str]:
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted, a read-only root, and no token."""
    kinds = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
    of_pod, of_container = spec.get("securityContext", {}), container.get("securityContext", {})
    capabilities = of_container.get("capabilities", {})
    checks = {
        "host namespaces": not any(spec.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")),
        "volumes": all(set(volume) - {"name"} <= kinds for volume in spec["volumes"]),
        "host ports": not any("hostPort" in port for port in container.get("ports", [])),
        "privileged": not of_container.get("privileged"),
        "allowPrivilegeEscalation": of_container.get("allowPrivilegeEscalation") is False,
        "capabilities": capabilities.get("drop") == ["ALL"] and not capabilities.get("add"),
        "runAsNonRoot": of_container.get("runAsNonRoot", of_pod.get("runAsNonRoot")) is True,
        "runAsUser": of_container.get("runAsUser", of_pod.get("runAsUser", 0)) > 0,
        "seccompProfile": of_container.get("seccompProfile", of_pod.get("seccompProfile", {})).get("type")
        == "RuntimeDefault",
        "sysctls": not of_pod.get("sysctls"),
        "readOnlyRootFilesystem": of_container.get("readOnlyRootFilesystem") is True,
        "API token": spec.get("automountServiceAccountToken") is False,
    }
    yield from (f"not restricted: {name}" for name, is_met in checks.items() if not is_met)


def pods_of(resource: dict[str, Any], resources: list[dict[str, Any]]) -> list[Pods]:
    """The pods that a cluster creates for the resource, one entry per template."""
    name, spec = resource["metadata"]["name"], resource.get("spec", {})
    if resource["kind"] == "Job":
        return [_job_pods(name, spec, labels={}, subdomain=spec["template"]["spec"].get("subdomain"))]
    if resource["kind"] == "Experiment":
        return pods_of(trial_job(resource), resources)
    if resource["kind"] == "JobSet":
        return [_jobset_pods(name, job) for job in spec["replicatedJobs"]]
    if resource["kind"] == "TrainJob":
        return [_trainjob_pods(name, spec, resources)]
    if resource["kind"] == "TFJob":
        return _tfjob_pods(name, resource["metadata"]["namespace"], spec["tfReplicaSpecs"])
    return []


def with_trial_jobs(resources: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The resources, with the Job of one trial instead of each Experiment."""
    return [trial_job(resource) if resource["kind"] == "Experiment" else resource for resource in resources]


def trial_job(experiment: dict[str, Any], choose: Callable = min) -> dict[str, Any]:
    """The Job of a trial with the lowest value of each parameter, or the highest with `choose=max`.

    Katib fills in the template in the same way: https://www.kubeflow.org/docs/components/katib/user-guides/trial-template
    """
    name = f"{experiment['metadata']['name']}-x7f2kq9d"
    values = {"${trialSpec.Name}": name}
    for parameter in experiment["spec"]["parameters"]:
        space = parameter["feasibleSpace"]
        values[parameter["name"]] = choose(space.get("list") or [space["min"], space["max"]], key=float)
    text = json.dumps(experiment["spec"]["trialTemplate"]["trialSpec"])
    for parameter in experiment["spec"]["trialTemplate"]["trialParameters"]:
        placeholder = f"${{trialParameters.{parameter['name']}}}"
        assert placeholder in text, f"{placeholder} is declared but not used"
        text = text.replace(placeholder, values[parameter["reference"]])
    assert "${" not in text, f"a parameter is used but not declared: {text[text.index('${') :][:60]}"
    return {**json.loads(text), "metadata": {"name": name, "namespace": experiment["metadata"]["namespace"]}}


def _job_pods(name: str, spec: dict[str, Any], *, labels: dict[str, str], subdomain: str | None) -> Pods:
    count, is_indexed = spec["completions"], spec.get("completionMode") == "Indexed"
    assert spec["parallelism"] == count, f"{name}: parallelism is {spec['parallelism']}, completions is {count}"
    return Pods(
        name=name,
        count=count,
        is_indexed=is_indexed,
        labels={"batch.kubernetes.io/job-name": name, **labels, **spec["template"]["metadata"]["labels"]},
        template=spec["template"],
        hosts=tuple(f"{name}-{i}.{subdomain}" for i in range(count)) if is_indexed and subdomain else (),
        platform=[{"JOB_COMPLETION_INDEX": str(i)} if is_indexed else {} for i in range(count)],
    )


def _jobset_pods(name: str, job: dict[str, Any]) -> Pods:
    assert job.get("replicas", 1) == 1, "all hosts must be pods of one Job"
    labels = {
        "jobset.sigs.k8s.io/jobset-name": name,
        "jobset.sigs.k8s.io/replicatedjob-name": job["name"],
        "jobset.sigs.k8s.io/job-index": "0",
    }
    return _job_pods(f"{name}-{job['name']}-0", job["template"]["spec"], labels=labels, subdomain=name)


def _trainjob_pods(name: str, spec: dict[str, Any], resources: list[dict[str, Any]]) -> Pods:
    """Kubeflow merges both resources: https://www.kubeflow.org/docs/components/trainer/operator-guides."""
    reference, trainer = spec["runtimeRef"], spec["trainer"]
    (runtime,) = [
        resource
        for resource in resources
        if resource["kind"] == reference["kind"] and resource["metadata"]["name"] == reference["name"]
    ]
    (job,) = copy.deepcopy(runtime["spec"]["template"]["spec"]["replicatedJobs"])
    pod_spec = job["template"]["spec"]["template"]["spec"]
    (container,) = [item for item in pod_spec["containers"] if item["name"] == "node"]
    container |= {key: trainer[key] for key in ("image", "command", "args") if key in trainer}
    container["env"] = container.get("env", []) + trainer.get("env", [])
    count = trainer.get("numNodes", runtime["spec"]["mlPolicy"]["numNodes"])
    job["template"]["spec"] |= {"completions": count, "parallelism": count, "completionMode": "Indexed"}
    return _jobset_pods(name, job)


def _tfjob_pods(name: str, namespace: str, replicas: dict[str, Any]) -> list[Pods]:
    """The operator creates a Service per pod, and sets TF_CONFIG if container and port have the expected names."""
    addresses = {}
    for kind, replica in replicas.items():
        (container,) = [c for c in replica["template"]["spec"]["containers"] if c["name"] == "tensorflow"]
        (port,) = [port["containerPort"] for port in container["ports"] if port["name"] == "tfjob-port"]
        hosts = [f"{name}-{kind.lower()}-{i}.{namespace}.svc" for i in range(replica["replicas"])]
        addresses[kind.lower()] = [f"{host}:{port}" for host in hosts]
    pods = []
    for kind, replica in replicas.items():
        configs = [
            json.dumps({"cluster": addresses, "task": {"type": kind.lower(), "index": i}, "environment": "cloud"})
            for i in range(replica["replicas"])
        ]
        pods.append(
            Pods(
                name=f"{name} {kind}",
                count=replica["replicas"],
                is_indexed=False,
                labels=replica["template"]["metadata"]["labels"],
                template=replica["template"],
                hosts=tuple(address.rpartition(":")[0] for address in addresses[kind.lower()]),
                platform=[{"TF_CONFIG": config} for config in configs],
            )
        )
    return pods


def environments(pods: Pods, resources: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The environment of each pod, as the kubelet composes it."""
    maps = {r["metadata"]["name"]: r["data"] for r in resources if r["kind"] == "ConfigMap"}
    shared = {}
    for source in pods.container.get("envFrom", []):
        shared |= maps[source["configMapRef"]["name"]]
    for variable in pods.container.get("env", []):
        if "value" in variable:
            shared[variable["name"]] = variable["value"]
        else:
            field = variable["valueFrom"]["fieldRef"]["fieldPath"]
            label = re.fullmatch(r"metadata\.labels\['(.+)'\]", field)[1]
            shared[variable["name"]] = pods.labels[label]
    return [shared | own for own in pods.platform]


def arguments(pods: Pods, environment: dict[str, str]) -> list[str]:
    """The args of the container with $(NAME) replaced; a name without a value is kept, as in a pod."""
    replace = functools.partial(re.sub, r"\$\((\w+)\)", lambda match: environment.get(match[1], match[0]))
    return [replace(argument) for argument in pods.container["args"]]


def all_pods(resources: list[dict[str, Any]]) -> list[Pods]:
    """The pods of all resources."""
    return list(itertools.chain.from_iterable(pods_of(resource, resources) for resource in resources))
