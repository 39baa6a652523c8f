"""The manifests in deploy/kubernetes: rendered by kubectl, validated strictly, and accepted by the trainer."""

import copy
import itertools
import re

import pytest
from absl import flags

from tests.support import manifests, trainer_flags
from trainer import cli, tune
from trainer.errors import UserError
from trainer.reporting import tuner_metrics
from trainer.runtime import cluster

OVERLAYS = [*sorted(f"overlays/{path.name}" for path in (manifests.KUBERNETES / "overlays").iterdir()), "katib"]
EVERYTHING = [*OVERLAYS, "administrator", "administrator-kueue"]
SEVERAL_HOSTS = {"overlays/several-hosts", "overlays/jobset", "overlays/trainjob", "overlays/tfjob"}


def mismatches(resources) -> list[str]:
    """Flags that the trainer rejects, and differences between the pods and the cluster that each pod resolves."""
    errors = []
    pods = manifests.all_pods(resources)
    hosts = list(itertools.chain.from_iterable(group.hosts for group in pods))
    total = sum(group.count for group in pods)
    roles = []
    for group in pods:
        for environment in manifests.environments(group, resources):
            try:
                trainer_flags.parse(manifests.arguments(group, environment))
                roles.append(cluster.resolve(environment))
            except (flags.Error, UserError, ValueError) as error:
                errors.append(f"{group.name}: {error}")
    ports = {port["containerPort"] for group in pods for port in group.container.get("ports", [])}
    for role in roles:
        if role.workers != total:
            errors.append(f"{total} pods, but a worker resolves {role.workers}")
        if role.workers > 1 and list(role.addresses) != [f"{host}:{port}" for host in hosts for port in ports]:
            errors.append(f"pods listen at {hosts}, {ports}, but a worker resolves {role.addresses}")
    if sorted(role.index for role in roles) != list(range(total)):
        errors.append(f"the indices of {total} workers are {sorted(role.index for role in roles)}")
    if sum(role.is_chief for role in roles) != 1:
        errors.append("there is not exactly one chief")
    return errors + _network_problems(resources, pods, ports)


def _network_problems(resources, pods, ports) -> list[str]:
    """Services and network policies that do not connect the workers."""
    errors = []
    for resource in resources:
        spec = resource.get("spec", {})
        if resource["kind"] == "Service":
            selected = [group for group in pods if spec["selector"].items() <= group.labels.items()]
            if not selected or spec.get("clusterIP") != "None" or not spec.get("publishNotReadyAddresses"):
                errors.append(
                    "the Service does not select these pods, is not headless, or omits pods that are not ready"
                )
            if {port["port"] for port in spec["ports"]} != ports:
                errors.append(f"the Service does not have the ports {ports}")
        if resource["kind"] == "NetworkPolicy":
            (rule,) = spec["ingress"]
            labels = spec["podSelector"]["matchLabels"], rule["from"][0]["podSelector"]["matchLabels"]
            if not all(label.items() <= group.labels.items() for label in labels for group in pods):
                errors.append("the NetworkPolicy does not select these pods")
            if not ports <= {port["port"] for port in rule["ports"]}:
                errors.append(f"the NetworkPolicy does not open {ports}")
    return errors


@pytest.mark.parametrize("name", EVERYTHING)
def test_each_manifest_has_no_problems(name):
    assert manifests.problems(manifests.render(name)) == []


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_trainer_accepts_arguments_and_environment_of_pods(name):
    resources = manifests.render(name)
    assert mismatches(resources) == []
    assert sum(pods.count for pods in manifests.all_pods(resources)) == (2 if name in SEVERAL_HOSTS else 1)


def fields(value, path=()):
    """Yields each object in a resource whose fields the API defines, with its path."""
    if isinstance(value, list):
        for i, item in enumerate(value):
            yield from fields(item, (*path, i))
    elif isinstance(value, dict):
        user_defined = {
            "annotations",
            "volumeAttributes",
            "labels",
            "matchLabels",
            "data",
            "limits",
            "requests",
            "nodeSelector",
            "selector",
            "nodeLabels",
        }
        if path and path[-1] in user_defined:
            return
        yield path, value
        for name, item in value.items():
            yield from fields(item, (*path, name))


@pytest.mark.parametrize("name", EVERYTHING)
def test_an_unknown_field_anywhere_is_rejected(name):
    original = manifests.render(name)
    for number, resource in enumerate(original):
        for path, _ in fields(resource):
            changed = copy.deepcopy(resource)
            target = changed
            for step in path:
                target = target[step]
            target["unknownField"] = "x"
            try:
                errors = list(manifests.schema_problems(changed))
            except (KeyError, TypeError, ValueError) as error:
                errors = [str(error)]
            assert errors, f"{name}, resource {number}: unknownField in {path} is accepted"


def argument_lists(value):
    if isinstance(value, dict):
        yield from ([value["args"]] if "args" in value else [])
        for item in value.values():
            yield from argument_lists(item)
    elif isinstance(value, list):
        for item in value:
            yield from argument_lists(item)


@pytest.mark.parametrize("name", EVERYTHING)
def test_all_args_are_those_of_a_trainer_container(name):
    resources = manifests.with_trial_jobs(manifests.render(name))
    expected = [pods.container["args"] for pods in manifests.all_pods(resources)]
    assert list(argument_lists(resources)) == expected


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_wrong_flag_anywhere_is_rejected(name):
    for wrong in ("--epoch=5", "--epochs=many", "--optimizer=adamm", "epochs", "--job_dir=$(JOB_DIRECTORY)"):
        for number in range(len(manifests.all_pods(manifests.render(name)))):
            resources = manifests.with_trial_jobs(manifests.render(name))
            manifests.all_pods(resources)[number].container["args"].append(wrong)
            assert mismatches(resources), f"{name}: {wrong}"


def replace(text: str, old: str, new: str) -> list[dict]:
    import yaml

    assert old in text, old
    return list(yaml.safe_load_all(text.replace(old, new)))


ERRORS = [
    ("one-gpu", "restartPolicy: Never", "restartPolicy: Nevver"),
    ("one-gpu", "action: Ignore", "action: ignore"),
    ("one-gpu", "containerName: trainer", "containerName: tensorflow"),
    ("one-gpu", "memory: 14Gi", "memory: 14GB"),
    ("one-gpu", "kind: Job\n", "kind: Jobb\n"),
    ("one-gpu", "apiVersion: batch/v1\n", "apiVersion: batch/v2\n"),
    ("one-gpu", "        - --require_gpu\n", ""),
    ("one-gpu", "runAsNonRoot: true", "runAsNonRoot: false"),
    ("one-gpu", "allowPrivilegeEscalation: false", "allowPrivilegeEscalation: true"),
    ("one-gpu", "readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false"),
    ("one-gpu", "mountPath: /tmp", "mountPath: /temp"),
    ("one-gpu", "name: trainer-settings\n  namespace", "name: trainer-setting\n  namespace"),
    ("one-gpu", "DATA_DIR: ", "DATA_DIRECTORY: "),
    ("spot", "terminationGracePeriodSeconds: 15", "terminationGracePeriodSeconds: fifteen"),
    ("spot", "effect: NoSchedule", "effect: NoShedule"),
    ("fuse", "driver: gcsfuse", "drivers: gcsfuse"),
    ("fuse", "  - csi:", "  - cso:"),
    ("kueue", "suspend: true", "suspended: true"),
    ("volume", "claimName: pictures", "claimName: picture"),
    ("volume", "ReadWriteOnce", "ReadWriteOne"),
    ("several-hosts", "completions: 2", "completions: 3"),
    ("several-hosts", "completions: 2\n  parallelism: 2", "completions: 3\n  parallelism: 3"),
    ("several-hosts", 'value: "2"', 'value: "3"'),
    ("several-hosts", "value: trainer-hosts", "value: trainer-host"),
    ("several-hosts", "subdomain: trainer-hosts", "subdomain: trainer-host"),
    ("several-hosts", "completionMode: Indexed", "completionMode: indexed"),
    ("several-hosts", "publishNotReadyAddresses: true", "publishNotReadyAddresses: false"),
    ("several-hosts", "containerPort: 2222", "containerPort: 2223"),
    ("several-hosts", "job-name: trainer", "job-name: trainers"),
    ("jobset", "completions: 2", "completions: 1"),
    ("jobset", "replicas: 1", "replicas: 2"),
    ("jobset", "action: FailJobSet", "action: Fail"),
    ("jobset", "name: REPLICATED_JOB_NAME", "name: REPLICATED_JOB"),
    ("jobset", "jobset-name", "jobset-nam"),
    ("trainjob", "numNodes: 2", "numNodes: 3"),
    ("trainjob", "    name: picture-trainer\n", "    name: picture-trainers\n"),
    ("trainjob", "kind: TrainingRuntime", "kind: TrainingRuntimes"),
    (
        "trainjob",
        "  name: trainer\n  namespace: pictures\nspec:\n  runtimeRef",
        "  name: 1trainer\n  namespace: pictures\nspec:\n  runtimeRef",
    ),
    ("tfjob", "name: tfjob-port", "name: tf-port"),
    ("tfjob", "- args", "- arguments"),
    ("tfjob", "Worker:", "Workers:"),
    ("tfjob", "restartPolicy: ExitCode", "restartPolicy: ExitCodes"),
    ("../katib", "type: maximize", "type: maximise"),
    ("../katib", "reference: dropout", "reference: drop"),
    ("../katib", "trialParameters.dropout}", "trialParameters.drop}"),
    ("../katib", "parameterType: double", "parameterType: float"),
    ("../katib", "action: Ignore", "action: ignore"),
]


@pytest.mark.parametrize(("name", "old", "new"), ERRORS)
def test_an_error_is_detected(name, old, new):
    resources = replace(manifests.rendered_text(f"overlays/{name}"), old, new)
    try:
        errors = manifests.problems(resources) + mismatches(resources)
    except (AssertionError, KeyError, TypeError, ValueError) as error:  # the checks themselves cannot continue
        errors = [str(error)]
    assert errors


def pod_failure_action(policy: dict, *, exit_code: int | None = None, is_disrupted: bool = False) -> str:
    """The action of the Job controller: that of the first rule that matches, else the failure counts."""
    for rule in policy["rules"]:
        if "onExitCodes" in rule and rule["onExitCodes"]["operator"] == "In" and not is_disrupted:
            if exit_code in rule["onExitCodes"]["values"]:
                return rule["action"]
        elif "onPodConditions" in rule and is_disrupted:
            return rule["action"]
    return "Count"


@pytest.mark.parametrize(
    "name", ["one-gpu", "several-hosts", "spot", "flex-start", "kueue", "volume", "fuse", "production", "../katib"]
)
def test_a_job_is_not_retried_after_a_user_error(name):
    resources = manifests.with_trial_jobs(manifests.render(f"overlays/{name}"))
    (job,) = [resource for resource in resources if resource["kind"] == "Job"]
    policy = job["spec"]["podFailurePolicy"]
    assert pod_failure_action(policy, exit_code=cli.EXIT_USER_ERROR) == "FailJob"
    assert pod_failure_action(policy, exit_code=cli.EXIT_STOPPED) == "Ignore"
    assert pod_failure_action(policy, exit_code=137, is_disrupted=True) == "Ignore"
    assert pod_failure_action(policy, exit_code=1) == "Count"
    # The API server requires both in a Job with a podFailurePolicy.
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"
    assert job["spec"]["podReplacementPolicy"] == "Failed"


@pytest.mark.parametrize(("name", "kind"), [("jobset", "JobSet"), ("trainjob", "TrainingRuntime")])
def test_a_jobset_distinguishes_user_errors_from_preemption(name, kind):
    (resource,) = [resource for resource in manifests.render(f"overlays/{name}") if resource["kind"] == kind]
    spec = resource["spec"] if kind == "JobSet" else resource["spec"]["template"]["spec"]
    (job,) = spec["replicatedJobs"]
    policy = job["template"]["spec"]["podFailurePolicy"]

    def action(message: str, reason: str = "PodFailurePolicy") -> str:
        for rule in spec["failurePolicy"]["rules"]:
            patterns = rule.get("onJobFailureMessagePatterns", [".*"])
            if reason in rule["onJobFailureReasons"] and any(re.search(pattern, message) for pattern in patterns):
                return rule["action"]
        return "RestartJobSet"

    for exit_code in (cli.EXIT_USER_ERROR, cli.EXIT_STOPPED):
        assert pod_failure_action(policy, exit_code=exit_code) == "FailJob"
    assert pod_failure_action(policy, exit_code=1) == "Count"
    assert job["template"]["spec"]["backoffLimit"] == 0
    # The messages of the Job controller: pkg/controller/job/pod_failure_policy.go
    failed = "Container trainer for pod pictures/trainer-0 failed with exit code {} matching FailJob rule at index {}"
    assert action(failed.format(2, 0)) == "FailJobSet"
    assert action(failed.format(143, 2)) == "RestartJobSetAndIgnoreMaxRestarts"
    disrupted = "Pod pictures/trainer-0 has condition DisruptionTarget matching FailJob rule at index 1"
    assert action(disrupted) == "RestartJobSetAndIgnoreMaxRestarts"
    assert action("Job has reached the specified backoff limit", "BackoffLimitExceeded") == "RestartJobSet"


def test_the_pods_of_all_overlays_have_the_same_security_context():
    pods = [group for name in OVERLAYS for group in manifests.all_pods(manifests.render(name))]
    for group in pods:
        assert group.spec["securityContext"] == pods[0].spec["securityContext"]
        assert group.container["securityContext"] == pods[0].container["securityContext"]
        assert group.container["resources"] == pods[0].container["resources"]
        assert group.container["args"][0] == pods[0].container["args"][0]
        # The trials of Katib have folders in the job_dir.
        assert group.container["args"][1].startswith(pods[0].container["args"][1])
        assert group.spec["serviceAccountName"] == "trainer"


def test_the_namespace_enforces_the_restricted_profile():
    (namespace,) = manifests.render("administrator")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    names = {resource["metadata"]["namespace"] for name in OVERLAYS for resource in manifests.render(name)}
    assert names == {namespace["metadata"]["name"]}


def test_the_production_overlay_uses_an_image_digest():
    (pods,) = manifests.all_pods(manifests.render("overlays/production"))
    assert "@sha256:" in pods.container["image"]


def test_images_of_a_mounted_bucket_are_read_from_the_mount():
    (pods,) = manifests.all_pods(manifests.render("overlays/fuse"))
    (environment,) = manifests.environments(pods, manifests.render("overlays/fuse"))
    assert environment["DATA_DIR"].startswith("/bucket/")
    assert environment["JOB_DIR"].startswith("gs://")
    (volume,) = [volume for volume in pods.spec["volumes"] if "csi" in volume]
    options = volume["csi"]["volumeAttributes"]["mountOptions"]
    assert " " not in options
    assert {"implicit-dirs", "uid=65532", "file-cache:max-size-mb:16000"} <= set(options.split(","))
    user = pods.spec["securityContext"]["runAsUser"]
    assert f"uid={user}" in options


def test_the_grace_period_of_a_spot_pod_is_at_most_15_seconds():
    (pods,) = manifests.all_pods(manifests.render("overlays/spot"))
    assert pods.spec["terminationGracePeriodSeconds"] <= 15
    assert pods.spec["nodeSelector"]["cloud.google.com/gke-spot"] == "true"


def test_the_queue_of_a_job_exists_and_covers_its_resources():
    (job,) = [resource for resource in manifests.render("overlays/kueue") if resource["kind"] == "Job"]
    queues = {resource["kind"]: resource for resource in manifests.render("administrator-kueue")}
    local, cluster_wide = queues["LocalQueue"], queues["ClusterQueue"]
    assert job["spec"]["suspend"] is True
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == local["metadata"]["name"]
    assert job["metadata"]["namespace"] == local["metadata"]["namespace"]
    assert local["spec"]["clusterQueue"] == cluster_wide["metadata"]["name"]
    (group,) = cluster_wide["spec"]["resourceGroups"]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    requested = set(container["resources"]["limits"]) | set(container["resources"]["requests"])
    assert requested <= set(group["coveredResources"])
    assert group["flavors"][0]["name"] == queues["ResourceFlavor"]["metadata"]["name"]


def test_katib_trials_have_own_folders_and_share_features():
    (experiment,) = [resource for resource in manifests.render("katib") if resource["kind"] == "Experiment"]
    spec = experiment["spec"]
    for choose in (min, max):
        job = manifests.trial_job(experiment, choose)
        (container,) = job["spec"]["template"]["spec"]["containers"]
        # Without a command, Katib looks up the entry point in the registry.
        assert container["command"] == ["python", "-m", "trainer.task"]
        assert container["name"] == spec["trialTemplate"]["primaryContainerName"]
        arguments = dict(argument[2:].split("=") for argument in container["args"] if "=" in argument)
        assert arguments["job_dir"].endswith(job["metadata"]["name"])
        assert job["metadata"]["name"] not in arguments["cache_dir"]
        assert {"name": tuner_metrics.KATIB_TRIAL_VARIABLE, "value": job["metadata"]["name"]} in container["env"]
        assert {parameter["name"] for parameter in spec["parameters"]} <= set(arguments)
    assert {spec["objective"]["objectiveMetricName"], *spec["objective"]["additionalMetricNames"]} == set(
        tuner_metrics.REPORTED_METRICS
    )


def test_all_tuners_have_the_search_space_of_trainer_tune():
    (experiment,) = [resource for resource in manifests.render("katib") if resource["kind"] == "Experiment"]
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed: pip install '.[dev]'")
    vertex = yaml.safe_load((manifests.ROOT / "deploy" / "vertex" / "tuning.yaml").read_text())
    for parameter in experiment["spec"]["parameters"]:
        space = parameter["feasibleSpace"]
        expected = tune.SPACE[parameter["name"]]
        if not isinstance(expected, tune.FloatRange):
            assert tuple(map(int, space["list"])) == expected
        else:
            is_logarithmic = space["distribution"] == "logUniform"
            actual = tune.FloatRange(float(space["min"]), float(space["max"]), is_logarithmic)
            assert actual == expected, parameter["name"]
    for parameter in vertex["studySpec"]["parameters"]:
        expected = tune.SPACE[parameter["parameterId"]]
        if not isinstance(expected, tune.FloatRange):
            assert tuple(parameter["discreteValueSpec"]["values"]) == expected
        else:
            space = parameter["doubleValueSpec"]
            is_logarithmic = parameter["scaleType"] == "UNIT_LOG_SCALE"
            actual = tune.FloatRange(space["minValue"], space["maxValue"], is_logarithmic)
            assert actual == expected, parameter["parameterId"]
    names = {parameter["name"] for parameter in experiment["spec"]["parameters"]}
    assert names == {parameter["parameterId"] for parameter in vertex["studySpec"]["parameters"]} == set(tune.SPACE)
