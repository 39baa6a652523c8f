"""The manifests in deploy/kubernetes: rendered by kubectl, validated strictly, understood by the trainer."""

import copy
import itertools

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
    """Where the trainer, started with those arguments in that environment, would not do what the manifests say."""
    found = []
    pods = manifests.all_pods(resources)
    hosts = list(itertools.chain.from_iterable(each.hosts for each in pods))
    total = sum(each.count for each in pods)
    roles = []
    for each in pods:
        for environment in manifests.environments(each, resources):
            try:
                trainer_flags.parse(manifests.arguments(each, environment))
                roles.append(cluster.resolve(environment))
            except (flags.Error, UserError, ValueError) as error:
                found.append(f"{each.name}: {error}")
    ports = {port["containerPort"] for each in pods for port in each.container.get("ports", [])}
    for role in roles:
        if role.workers != total:
            found.append(f"{total} pods, but a worker thinks there are {role.workers}")
        if role.workers > 1 and list(role.addresses) != [f"{host}:{port}" for host in hosts for port in ports]:
            found.append(f"pods listen at {hosts}, {ports}, but a worker looks for {role.addresses}")
    if sorted(role.index for role in roles) != list(range(total)):
        found.append(f"the workers are {sorted(role.index for role in roles)} of {total}")
    if sum(role.is_chief for role in roles) != 1:
        found.append("there is not one chief")
    return found + _network_problems(resources, pods, ports)


def _network_problems(resources, pods, ports) -> list[str]:
    """Services and network policies that do not let the workers through to each other."""
    found = []
    for resource in resources:
        spec = resource.get("spec", {})
        if resource["kind"] == "Service":
            selected = [each for each in pods if spec["selector"].items() <= each.labels.items()]
            if not selected or spec.get("clusterIP") != "None" or not spec.get("publishNotReadyAddresses"):
                found.append(
                    "the Service is not a headless one of these pods that publishes them before they are ready"
                )
            if {port["port"] for port in spec["ports"]} != ports:
                found.append(f"the Service has other ports than {ports}")
        if resource["kind"] == "NetworkPolicy":
            (rule,) = spec["ingress"]
            labels = spec["podSelector"]["matchLabels"], rule["from"][0]["podSelector"]["matchLabels"]
            if not all(label.items() <= each.labels.items() for label in labels for each in pods):
                found.append("the NetworkPolicy does not select these pods")
            if not ports <= {port["port"] for port in rule["ports"]}:
                found.append(f"the NetworkPolicy does not open {ports}")
    return found


@pytest.mark.parametrize("name", EVERYTHING)
def test_each_manifest_is_what_a_cluster_would_take(name):
    assert manifests.problems(manifests.render(name)) == []


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_trainer_understands_what_each_overlay_gives_its_pods(name):
    resources = manifests.render(name)
    assert mismatches(resources) == []
    assert sum(pods.count for pods in manifests.all_pods(resources)) == (2 if name in SEVERAL_HOSTS else 1)


def fields(value, path=()):
    """Every object in a resource whose fields the API defines, with its path."""
    if isinstance(value, list):
        for i, item in enumerate(value):
            yield from fields(item, (*path, i))
    elif isinstance(value, dict):
        names_of_ours = {
            "labels",
            "matchLabels",
            "data",
            "limits",
            "requests",
            "nodeSelector",
            "selector",
            "nodeLabels",
        }
        if path and path[-1] in names_of_ours:
            return
        yield path, value
        for name, item in value.items():
            yield from fields(item, (*path, name))


@pytest.mark.parametrize("name", EVERYTHING)
def test_an_unknown_field_anywhere_is_refused(name):
    original = manifests.render(name)
    for number, resource in enumerate(original):
        for path, _ in fields(resource):
            changed = copy.deepcopy(resource)
            target = changed
            for step in path:
                target = target[step]
            target["unknownField"] = "x"
            try:
                found = list(manifests._schema_problems(changed))
            except (KeyError, TypeError, ValueError) as error:
                found = [str(error)]
            assert found, f"{name}, resource {number}: unknownField in {path} is taken"


def argument_lists(value):
    if isinstance(value, dict):
        yield from ([value["args"]] if "args" in value else [])
        for item in value.values():
            yield from argument_lists(item)
    elif isinstance(value, list):
        for item in value:
            yield from argument_lists(item)


@pytest.mark.parametrize("name", EVERYTHING)
def test_no_arguments_stand_where_the_trainer_would_not_get_them(name):
    resources = manifests.started(manifests.render(name))
    given = [pods.container["args"] for pods in manifests.all_pods(resources)]
    assert list(argument_lists(resources)) == given


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_wrong_flag_anywhere_is_refused(name):
    for wrong in ("--epoch=5", "--epochs=many", "--optimizer=adamm", "epochs", "--job_dir=$(JOB_DIRECTORY)"):
        for number in range(len(manifests.all_pods(manifests.render(name)))):
            resources = manifests.started(manifests.render(name))
            manifests.all_pods(resources)[number].container["args"].append(wrong)
            assert mismatches(resources), f"{name}: {wrong}"


def replace(text: str, old: str, new: str) -> list[dict]:
    import yaml

    assert old in text, old
    return list(yaml.safe_load_all(text.replace(old, new)))


WRONG = [
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


@pytest.mark.parametrize(("name", "old", "new"), WRONG)
def test_a_mistake_is_found(name, old, new):
    resources = replace(manifests._rendered(f"overlays/{name}"), old, new)
    try:
        found = manifests.problems(resources) + mismatches(resources)
    except (AssertionError, KeyError, TypeError, ValueError) as error:  # too wrong to look any further
        found = [str(error)]
    assert found


def pod_failure_action(policy: dict, *, exit_code: int | None = None, is_disrupted: bool = False) -> str:
    """What the Job controller does: the first rule that matches, else the failure counts."""
    for rule in policy["rules"]:
        if "onExitCodes" in rule and rule["onExitCodes"]["operator"] == "In" and not is_disrupted:
            if exit_code in rule["onExitCodes"]["values"]:
                return rule["action"]
        elif "onPodConditions" in rule and is_disrupted:
            return rule["action"]
    return "Count"


@pytest.mark.parametrize("name", ["one-gpu", "several-hosts", "spot", "kueue", "volume", "production", "../katib"])
def test_only_what_may_go_better_is_tried_again(name):
    resources = manifests.started(manifests.render(f"overlays/{name}"))
    (job,) = [resource for resource in resources if resource["kind"] == "Job"]
    policy = job["spec"]["podFailurePolicy"]
    assert pod_failure_action(policy, exit_code=cli.EXIT_USER_ERROR) == "FailJob"
    assert pod_failure_action(policy, exit_code=cli.EXIT_STOPPED) == "Ignore"
    assert pod_failure_action(policy, exit_code=137, is_disrupted=True) == "Ignore"
    assert pod_failure_action(policy, exit_code=1) == "Count"
    # The API server wants both of a Job with a podFailurePolicy.
    assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"
    assert job["spec"]["podReplacementPolicy"] == "Failed"


@pytest.mark.parametrize(("name", "kind"), [("jobset", "JobSet"), ("trainjob", "TrainingRuntime")])
def test_a_jobset_tells_the_users_mistake_from_preemption(name, kind):
    import re

    (resource,) = [each for each in manifests.render(f"overlays/{name}") if each["kind"] == kind]
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
    # As the Job controller words it: pkg/controller/job/pod_failure_policy.go
    failed = "Container trainer for pod pictures/trainer-0 failed with exit code {} matching FailJob rule at index {}"
    assert action(failed.format(2, 0)) == "FailJobSet"
    assert action(failed.format(143, 2)) == "RestartJobSetAndIgnoreMaxRestarts"
    disrupted = "Pod pictures/trainer-0 has condition DisruptionTarget matching FailJob rule at index 1"
    assert action(disrupted) == "RestartJobSetAndIgnoreMaxRestarts"
    assert action("Job has reached the specified backoff limit", "BackoffLimitExceeded") == "RestartJobSet"


def test_the_pods_of_all_overlays_are_confined_in_the_same_way():
    pods = [each for name in OVERLAYS for each in manifests.all_pods(manifests.render(name))]
    for each in pods:
        assert each.spec["securityContext"] == pods[0].spec["securityContext"]
        assert each.container["securityContext"] == pods[0].container["securityContext"]
        assert each.container["resources"] == pods[0].container["resources"]
        assert each.container["args"][0] == pods[0].container["args"][0]
        assert each.container["args"][1].startswith(
            pods[0].container["args"][1]
        )  # Katib's trials each have a folder in it
        assert each.spec["serviceAccountName"] == "trainer"


def test_the_namespace_refuses_pods_that_are_not_confined():
    (namespace,) = manifests.render("administrator")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    names = {each["metadata"]["namespace"] for name in OVERLAYS for each in manifests.render(name)}
    assert names == {namespace["metadata"]["name"]}


def test_production_names_its_image_by_digest():
    (pods,) = manifests.all_pods(manifests.render("overlays/production"))
    assert "@sha256:" in pods.container["image"]


def test_a_spot_pod_asks_for_no_more_time_than_it_gets():
    (pods,) = manifests.all_pods(manifests.render("overlays/spot"))
    assert pods.spec["terminationGracePeriodSeconds"] <= 15
    assert pods.spec["nodeSelector"]["cloud.google.com/gke-spot"] == "true"


def test_the_queue_that_a_job_names_is_there_and_covers_what_it_asks_for():
    (job,) = [resource for resource in manifests.render("overlays/kueue") if resource["kind"] == "Job"]
    queues = {resource["kind"]: resource for resource in manifests.render("administrator-kueue")}
    local, whole = queues["LocalQueue"], queues["ClusterQueue"]
    assert job["spec"]["suspend"] is True
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == local["metadata"]["name"]
    assert job["metadata"]["namespace"] == local["metadata"]["namespace"]
    assert local["spec"]["clusterQueue"] == whole["metadata"]["name"]
    (group,) = whole["spec"]["resourceGroups"]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    asked = set(container["resources"]["limits"]) | set(container["resources"]["requests"])
    assert asked <= set(group["coveredResources"])
    assert group["flavors"][0]["name"] == queues["ResourceFlavor"]["metadata"]["name"]


def test_katibs_trials_are_told_apart_share_features_and_stay_within_what_the_trainer_takes():
    (experiment,) = [resource for resource in manifests.render("katib") if resource["kind"] == "Experiment"]
    spec = experiment["spec"]
    for choose in (min, max):
        job = manifests.trial_job(experiment, choose)
        (container,) = job["spec"]["template"]["spec"]["containers"]
        assert container["command"] == [
            "python",
            "-m",
            "trainer.task",
        ]  # else Katib asks the registry for the entry point
        assert container["name"] == spec["trialTemplate"]["primaryContainerName"]
        arguments = dict(argument[2:].split("=") for argument in container["args"] if "=" in argument)
        assert arguments["job_dir"].endswith(job["metadata"]["name"])
        assert job["metadata"]["name"] not in arguments["cache_dir"]
        assert {"name": tuner_metrics.KATIB_TRIAL_VARIABLE, "value": job["metadata"]["name"]} in container["env"]
        assert {parameter["name"] for parameter in spec["parameters"]} <= set(arguments)
    assert {spec["objective"]["objectiveMetricName"], *spec["objective"]["additionalMetricNames"]} == set(
        tuner_metrics.REPORTED_METRICS
    )


def test_every_tuner_looks_in_the_same_space():
    (experiment,) = [resource for resource in manifests.render("katib") if resource["kind"] == "Experiment"]
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed: pip install '.[dev]'")
    vertex = yaml.safe_load((manifests.ROOT / "deploy" / "vertex" / "tuning.yaml").read_text())
    for parameter in experiment["spec"]["parameters"]:
        space = parameter["feasibleSpace"]
        expected = tune.SPACE[parameter["name"]]
        if parameter["name"] in tune.CHOICES:
            assert tuple(map(int, space["list"])) == expected
        else:
            found = float(space["min"]), float(space["max"]), space["distribution"] == "logUniform"
            assert found == expected, parameter["name"]
    for parameter in vertex["studySpec"]["parameters"]:
        expected = tune.SPACE[parameter["parameterId"]]
        if parameter["parameterId"] in tune.CHOICES:
            assert tuple(parameter["discreteValueSpec"]["values"]) == expected
        else:
            space = parameter["doubleValueSpec"]
            found = space["minValue"], space["maxValue"], parameter["scaleType"] == "UNIT_LOG_SCALE"
            assert found == expected, parameter["parameterId"]
    names = {parameter["name"] for parameter in experiment["spec"]["parameters"]}
    assert names == {parameter["parameterId"] for parameter in vertex["studySpec"]["parameters"]} == set(tune.SPACE)
