"""Kubernetes manifests as the cluster would see them: rendered, validated, and each pod's arguments and environment.

What is checked here and by what:
  fields and types of Kubernetes' own kinds   kubernetes-validate, strict: unknown fields are refused
  fields and types of JobSet, TrainJob, ...   tests/schemas, made from their CRDs and closed, with their CEL rules
  what both miss                              the rules below: enums, quantities, names that refer to nothing, kinds
                                              that nobody knows, the Pod Security profile `restricted`
"""

import copy
import functools
import itertools
import json
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

from tests.support.paths import ROOT

KUBERNETES = ROOT / "deploy" / "kubernetes"
SCHEMAS = ROOT / "tests" / "deploy" / "schemas"
KUBERNETES_VERSION = "1.37"

# https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity
_QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?")
_QUANTITIES = {"limits", "requests", "sizeLimit", "nominalQuota", "borrowingLimit"}
# (the field it stands in, field) -> what the API server takes there; the JSON schemas say `string`.
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
        *("BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy"),
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
# Of Kubernetes' own kinds, in which a cluster must have what they name; CRDs are those in tests/schemas.
_KINDS = {"ConfigMap", "Job", "Namespace", "NetworkPolicy", "PersistentVolumeClaim", "Service", "ServiceAccount"}


class Pods(NamedTuple):
    """The pods of one template and what their platform puts into them."""

    name: str  # of the Job, JobSet, ... that they belong to
    count: int
    is_indexed: bool
    labels: dict[str, str]  # the platform's own and the template's
    template: dict[str, Any]
    hosts: tuple[str, ...]  # the DNS name that the platform gives each pod; empty without
    platform: list[dict[str, str]]  # the variables that it sets in each pod

    @property
    def spec(self) -> dict[str, Any]:
        """The pod's own spec."""
        return self.template["spec"]

    @property
    def container(self) -> dict[str, Any]:
        """The only container."""
        (container,) = self.spec["containers"]
        return container


@functools.cache
def _kubectl() -> str:
    beside_python = pathlib.Path(sys.executable).parent / "kubectl"  # `make test` puts it there
    found = str(beside_python) if beside_python.exists() else shutil.which("kubectl")
    if not found:
        pytest.skip("no kubectl: `make test` takes it from a package; or put one on the PATH")
    return found


@functools.cache
def _rendered(name: str) -> str:
    kubectl = subprocess.run([_kubectl(), "kustomize", str(KUBERNETES / name)], capture_output=True, text=True)
    assert kubectl.returncode == 0, f"{name}: {kubectl.stderr}"
    return kubectl.stdout


def render(name: str) -> list[dict[str, Any]]:
    """What `kubectl kustomize deploy/kubernetes/NAME` gives, fresh with every call."""
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed: pip install '.[dev]'")
    return list(yaml.safe_load_all(_rendered(name)))


def problems(resources: list[dict[str, Any]]) -> list[str]:
    """Everything that is wrong with those resources, empty if they are right."""
    found = []
    for resource in resources:
        where = f"{resource['kind']} {resource['metadata']['name']}"
        found += [f"{where}: {problem}" for problem in [*_schema_problems(resource), *_value_problems(resource)]]
        for pods in pods_of(resource, resources):
            found += [f"{where}: {problem}" for problem in _pod_problems(pods, resource, resources)]
    return found


def _schema_problems(resource: dict[str, Any]) -> Iterator[str]:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="not installed: pip install '.[dev]'")
    jsonschema = pytest.importorskip("jsonschema", reason="not installed: pip install '.[dev]'")
    path = SCHEMAS / f"{resource['apiVersion'].replace('/', '_')}_{resource['kind']}.json"
    if path.exists():
        schema = _schema(path)
        errors = list(jsonschema.Draft202012Validator(schema).iter_errors(resource))
        yield from (f"{error.json_path}: {error.message[:200]}" for error in errors)
        if not errors:  # the rules count on the types
            complete = copy.deepcopy(resource)
            _apply_defaults(schema, complete)
            yield from _rule_problems(schema, complete, "$")
            if resource["kind"] == "Experiment":  # the cluster looks at what is in it only when a trial starts
                yield from (f"trialSpec: {problem}" for problem in _schema_problems(trial_job(resource)))
        return
    if resource["kind"] not in _KINDS:
        yield "nobody knows this kind"
        return
    try:
        kubernetes_validate.validate(resource, KUBERNETES_VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        yield f"{error.json_path}: {error.message[:200]}"
    except kubernetes_validate.SchemaNotFoundError as error:  # the command line only warns
        yield error.message


@functools.cache
def _schema(path: pathlib.Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def _apply_defaults(schema: dict[str, Any], value: Any) -> None:
    """Fills in the CRD's defaults, as the API server does before its rules look."""
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
    """What the CRD's CEL rules say against the value; those that compare with an older self do not apply."""
    cel = pytest.importorskip("cel", reason="common-expression-language is not installed: pip install '.[dev]'")
    for rule in schema.get("x-kubernetes-validations", []):
        if "oldSelf" not in rule["rule"] and cel.evaluate(rule["rule"], {"self": value}) is not True:
            yield f"{path}: {rule.get('message', rule['rule'])}"
    if isinstance(value, dict):
        others = schema.get("additionalProperties")
        for name, item in value.items():
            field = schema.get("properties", {}).get(name) or (others if isinstance(others, dict) else None)
            if field:
                yield from _rule_problems(field, item, f"{path}.{name}")
    elif isinstance(value, list) and "items" in schema:
        for i, item in enumerate(value):
            yield from _rule_problems(schema["items"], item, f"{path}[{i}]")


def _value_problems(value: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Enums and quantities, which Kubernetes' JSON schemas take for any string."""
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
                    yield f"{'.'.join((*path, name))}: {quantity!r} is no quantity"
        for parent in (".".join(path[-2:]), *path[-1:]):
            allowed = _ENUMS.get((parent, name))
            for choice in item if isinstance(item, list) else [item]:
                if allowed and isinstance(choice, str) and choice not in allowed:
                    yield f"{'.'.join((*path, name))}: {choice!r}, expected one of {sorted(allowed)}"
        yield from _value_problems(item, (*path, name))


def _pod_problems(pods: Pods, owner: dict[str, Any], resources: list[dict[str, Any]]) -> Iterator[str]:
    """Names that refer to nothing, numbers that disagree, and what the profile `restricted` forbids."""
    spec, container = pods.spec, pods.container
    named = {(resource["kind"], resource["metadata"]["name"]) for resource in resources}
    wanted = [("ServiceAccount", spec.get("serviceAccountName"))]
    wanted += [("ConfigMap", source["configMapRef"]["name"]) for source in container.get("envFrom", [])]
    wanted += [
        ("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"])
        for volume in spec["volumes"]
        if "persistentVolumeClaim" in volume
    ]
    wanted += [("Service", spec["subdomain"])] if "subdomain" in spec else []
    yield from (f"{kind} {name} is named, but not there" for kind, name in wanted if (kind, name) not in named)
    namespaces = {r["metadata"].get("namespace") for r in resources if r["kind"] not in ("Namespace", "ResourceFlavor")}
    if len(namespaces) != 1:
        yield f"namespaces {namespaces}, expected one"
    mounts, volumes = (
        {item["name"] for item in container["volumeMounts"]},
        {item["name"] for item in spec["volumes"]},
    )
    if mounts != volumes:
        yield f"volumes {sorted(volumes)}, but mounted are {sorted(mounts)}"
    for path in ("/tmp", "/dev/shm"):
        if path not in {mount["mountPath"] for mount in container["volumeMounts"]}:
            yield f"nothing is mounted at {path}"
    for name in _named_containers(owner):
        if name != container["name"]:
            yield f"podFailurePolicy names a container {name}, there is {container['name']}"
    for name, limit in container["resources"]["limits"].items():
        request = container["resources"]["requests"].get(name, limit)
        if request != limit:  # a GPU or memory cannot be overcommitted safely
            yield f"{name} is requested as {request}, but limited to {limit}"
    if "nvidia.com/gpu" in container["resources"]["limits"] and "--require_gpu" not in container["args"]:
        yield "a GPU is asked for, but the job would run without one too: add --require_gpu"
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
    """https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted, and a read-only root."""
    kinds = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
    pod, own = spec.get("securityContext", {}), container.get("securityContext", {})
    capabilities = own.get("capabilities", {})
    checks = {
        "the host's namespaces": not any(spec.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")),
        "volumes": all(set(volume) - {"name"} <= kinds for volume in spec["volumes"]),
        "host ports": not any("hostPort" in port for port in container.get("ports", [])),
        "privileged": not own.get("privileged"),
        "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is False,
        "capabilities": capabilities.get("drop") == ["ALL"] and not capabilities.get("add"),
        "runAsNonRoot": own.get("runAsNonRoot", pod.get("runAsNonRoot")) is True,
        "runAsUser": own.get("runAsUser", pod.get("runAsUser", 0)) > 0,
        "seccompProfile": own.get("seccompProfile", pod.get("seccompProfile", {})).get("type") == "RuntimeDefault",
        "sysctls": not pod.get("sysctls"),
        "readOnlyRootFilesystem": own.get("readOnlyRootFilesystem") is True,
        "a token for the API": spec.get("automountServiceAccountToken") is False,
    }
    yield from (f"not restricted: {name}" for name, is_met in checks.items() if not is_met)


def pods_of(resource: dict[str, Any], resources: list[dict[str, Any]]) -> list[Pods]:
    """The pods that a cluster would make of the resource, one entry per template."""
    name, spec = resource["metadata"]["name"], resource.get("spec", {})
    if resource["kind"] == "Job":
        return [_job_pods(name, spec, {}, spec["template"]["spec"].get("subdomain"))]
    if resource["kind"] == "Experiment":
        return pods_of(trial_job(resource), resources)
    if resource["kind"] == "JobSet":
        return [_jobset_pods(name, job) for job in spec["replicatedJobs"]]
    if resource["kind"] == "TrainJob":
        (runtime,) = [
            other
            for other in resources
            if other["kind"] == spec["runtimeRef"]["kind"] and other["metadata"]["name"] == spec["runtimeRef"]["name"]
        ]
        (job,) = copy.deepcopy(runtime["spec"]["template"]["spec"]["replicatedJobs"])
        # What Kubeflow does with the two: https://www.kubeflow.org/docs/components/trainer/operator-guides
        trainer = spec["trainer"]
        pod_spec = job["template"]["spec"]["template"]["spec"]
        (container,) = [item for item in pod_spec["containers"] if item["name"] == "node"]
        container |= {key: trainer[key] for key in ("image", "command", "args") if key in trainer}
        container["env"] = container.get("env", []) + trainer.get("env", [])
        count = trainer.get("numNodes", runtime["spec"]["mlPolicy"]["numNodes"])
        job["template"]["spec"] |= {"completions": count, "parallelism": count, "completionMode": "Indexed"}
        return [_jobset_pods(name, job)]
    if resource["kind"] == "TFJob":
        return _tfjob_pods(name, resource["metadata"]["namespace"], spec["tfReplicaSpecs"])
    return []


def started(resources: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The resources with a trial's Job in place of each Experiment."""
    return [trial_job(resource) if resource["kind"] == "Experiment" else resource for resource in resources]


def trial_job(experiment: dict[str, Any], choose: Callable = min) -> dict[str, Any]:
    """The Job of a trial, each parameter at its lowest value, or at its highest with `choose=max`.

    As Katib fills it in: https://www.kubeflow.org/docs/components/katib/user-guides/trial-template
    """
    name = f"{experiment['metadata']['name']}-x7f2kq9d"
    values = {"${trialSpec.Name}": name}
    for parameter in experiment["spec"]["parameters"]:
        space = parameter["feasibleSpace"]
        values[parameter["name"]] = choose(space.get("list") or [space["min"], space["max"]], key=float)
    text = json.dumps(experiment["spec"]["trialTemplate"]["trialSpec"])
    for parameter in experiment["spec"]["trialTemplate"]["trialParameters"]:
        placeholder = f"${{trialParameters.{parameter['name']}}}"
        assert placeholder in text, f"{placeholder} is declared and not used"
        text = text.replace(placeholder, values[parameter["reference"]])
    assert "${" not in text, f"a parameter is used and not declared: {text[text.index('${') :][:60]}"
    return {**json.loads(text), "metadata": {"name": name, "namespace": experiment["metadata"]["namespace"]}}


def _job_pods(name: str, spec: dict[str, Any], labels: dict[str, str], subdomain: str | None) -> Pods:
    count, is_indexed = spec["completions"], spec.get("completionMode") == "Indexed"
    assert spec["parallelism"] == count, f"{name}: {spec['parallelism']} of {count} pods at a time"
    return Pods(
        name,
        count,
        is_indexed,
        {"batch.kubernetes.io/job-name": name, **labels, **spec["template"]["metadata"]["labels"]},
        spec["template"],
        tuple(f"{name}-{i}.{subdomain}" for i in range(count)) if is_indexed and subdomain else (),
        [{"JOB_COMPLETION_INDEX": str(i)} if is_indexed else {} for i in range(count)],
    )


def _jobset_pods(name: str, job: dict[str, Any]) -> Pods:
    assert job.get("replicas", 1) == 1, "all hosts are pods of one Job"
    labels = {
        "jobset.sigs.k8s.io/jobset-name": name,
        "jobset.sigs.k8s.io/replicatedjob-name": job["name"],
        "jobset.sigs.k8s.io/job-index": "0",
    }
    return _job_pods(f"{name}-{job['name']}-0", job["template"]["spec"], labels, name)


def _tfjob_pods(name: str, namespace: str, replicas: dict[str, Any]) -> list[Pods]:
    """The operator makes a Service per pod and writes TF_CONFIG if container and port have the names it looks for."""
    addresses = {}
    for kind, replica in replicas.items():
        (container,) = [c for c in replica["template"]["spec"]["containers"] if c["name"] == "tensorflow"]
        (port,) = [port["containerPort"] for port in container["ports"] if port["name"] == "tfjob-port"]
        hosts = [f"{name}-{kind.lower()}-{i}.{namespace}.svc" for i in range(replica["replicas"])]
        addresses[kind.lower()] = [f"{host}:{port}" for host in hosts]
    found = []
    for kind, replica in replicas.items():
        configs = [
            json.dumps({"cluster": addresses, "task": {"type": kind.lower(), "index": i}, "environment": "cloud"})
            for i in range(replica["replicas"])
        ]
        hosts = tuple(address.rpartition(":")[0] for address in addresses[kind.lower()])
        labels = replica["template"]["metadata"]["labels"]
        variables = [{"TF_CONFIG": config} for config in configs]
        found.append(Pods(f"{name} {kind}", replica["replicas"], False, labels, replica["template"], hosts, variables))
    return found


def environments(pods: Pods, resources: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The environment of each pod, as the kubelet puts it together."""
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
    """The container's args with $(NAME) replaced; what has no value stays as it is, as in a pod."""
    replace = functools.partial(re.sub, r"\$\((\w+)\)", lambda match: environment.get(match[1], match[0]))
    return [replace(argument) for argument in pods.container["args"]]


def all_pods(resources: list[dict[str, Any]]) -> list[Pods]:
    """The pods of all resources."""
    return list(itertools.chain.from_iterable(pods_of(resource, resources) for resource in resources))
