"""How each platform describes the cluster to a worker, and the checks before TensorFlow starts."""

import dataclasses
import json
import socket
import time

import pytest

from trainer.errors import UserError
from trainer.runtime import cluster
from trainer.runtime.cluster import Cluster

# https://cloud.google.com/vertex-ai/docs/training/distributed-training shows this cluster with a parameter server.
VERTEX = {
    "chief": ["training-workerpool0-ab-0:2222"],
    "worker": ["training-workerpool1-ab-0:2222", "training-workerpool1-ab-1:2222"],
}
VERTEX_ADDRESSES = (*VERTEX["chief"], *VERTEX["worker"])
# The same page's CLUSTER_SPEC, without parameter servers and evaluators.
POOLS = {
    "workerpool0": ["cmle-training-workerpool0-ab-0:2222"],
    "workerpool1": ["cmle-training-workerpool1-ab-0:2222", "cmle-training-workerpool1-ab-1:2222"],
}
POOL_ADDRESSES = (*POOLS["workerpool0"], *POOLS["workerpool1"])
SERVERS = {"workerpool2": ["cmle-training-workerpool2-ab-0:2222", "cmle-training-workerpool2-ab-1:2222"]}
EVALUATORS = {"workerpool3": [f"cmle-training-workerpool3-ab-{i}:2222" for i in range(3)]}
# https://www.tensorflow.org/tutorials/distribute/multi_worker_with_keras
TUTORIAL = ("localhost:12345", "localhost:23456")
# kubeflow/training-operator, pkg/controller.v1/tensorflow: <job>-<type>-<i>.<namespace>.svc:2222
TFJOB = {name: [f"test-tfjob-{name}-0.ns3.svc:2222"] for name in ("chief", "worker")}
TFJOB_ADDRESSES = (*TFJOB["chief"], *TFJOB["worker"])
# https://kubernetes.io/docs/tasks/job/job-with-pod-to-pod-communication/
INDEXED_JOB = {"TRAINER_HOSTS": "3", "TRAINER_JOB": "example-job", "TRAINER_SERVICE": "headless-svc"}
# https://jobset.sigs.k8s.io/docs/concepts/: pytorch-workers-0-0.pytorch is its first host
JOBSET = {"TRAINER_HOSTS": "4", "JOBSET_NAME": "pytorch", "REPLICATED_JOB_NAME": "workers", "JOB_INDEX": "0"}
# kubeflow/trainer, pkg/runtime/framework/plugins/xgboost: <trainjob>-node-0-0.<trainjob>
TRAINJOB = {"TRAINER_HOSTS": "2", "TRAINJOB_NAME": "cats"}
# What srun of Slurm 22.05 sets in a task of `srun --nodes=2 --ntasks-per-node=1` within `sbatch --nodes=4`.
SLURM = {
    "SLURM_JOB_ID": "20117",
    "SLURM_JOB_NUM_NODES": "4",
    "SLURM_NNODES": "4",
    "SLURM_JOB_NODELIST": "gpu[07-10]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "1",
    "SLURM_NODEID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NODELIST": "gpu[09-10]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURMD_NODENAME": "gpu10",
}
# The batch script of `sbatch --nodes=4`, without srun.
SLURM_BATCH = {name: value for name, value in SLURM.items() if "STEP" not in name} | {
    "SLURM_PROCID": "0",
    "SLURM_NODEID": "0",
    "SLURMD_NODENAME": "gpu07",
}


def spec(members, kind, index, **more):
    return json.dumps({"cluster": members, "task": {"type": kind, "index": index}, **more})


def several(index, addresses, source):
    return Cluster(len(addresses), index, index == 0, tuple(addresses), source)


def single(source):
    return Cluster(1, 0, True, (), source)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        pytest.param({}, single("no cluster"), id="nothing-set"),
        pytest.param({"TF_CONFIG": " ", "JOB_COMPLETION_INDEX": ""}, single("no cluster"), id="set-but-empty"),
        pytest.param({"TF_CONFIG": "{}"}, single("no cluster"), id="TF_CONFIG-empty"),
        pytest.param({"TF_CONFIG": '{"environment": "cloud"}'}, single("no cluster"), id="TF_CONFIG-environment-only"),
        pytest.param({"TF_CONFIG": spec({}, "worker", 0)}, single("no cluster"), id="TF_CONFIG-empty-cluster"),
        pytest.param({"TF_CONFIG": spec({"worker": ["a:1"]}, "worker", 0)}, single("TF_CONFIG"), id="TF_CONFIG-worker"),
        pytest.param({"TF_CONFIG": spec({"chief": ["a:1"]}, "chief", 0)}, single("TF_CONFIG"), id="TF_CONFIG-chief"),
        pytest.param(
            {"TF_CONFIG": spec(VERTEX, "chief", 0, environment="cloud", job={"worker_pool_specs": []})},
            several(0, VERTEX_ADDRESSES, "TF_CONFIG"),
            id="Vertex-chief",
        ),
        pytest.param(
            {
                "TF_CONFIG": json.dumps(
                    {"cluster": VERTEX, "task": {"cloud": "id", "index": 0, "trial": "1", "type": "worker"}}
                )
            },
            several(1, VERTEX_ADDRESSES, "TF_CONFIG"),
            id="Vertex-worker-of-a-trial",
        ),
        pytest.param(
            {"TF_CONFIG": spec({"worker": VERTEX["worker"], "master": VERTEX["chief"]}, "worker", 1)},
            several(2, VERTEX_ADDRESSES, "TF_CONFIG"),
            id="Vertex-master-is-chief",
        ),
        pytest.param(
            {"CLUSTER_SPEC": spec({"workerpool0": ["cmle-training-workerpool0-ab-0:2222"]}, "workerpool0", 0)},
            single("CLUSTER_SPEC"),
            id="CLUSTER_SPEC-one-replica",
        ),
        pytest.param(
            {"CLUSTER_SPEC": json.dumps({"cluster": POOLS, "task": {"type": "workerpool0", "index": 0, "trial": "3"}})},
            several(0, POOL_ADDRESSES, "CLUSTER_SPEC"),
            id="CLUSTER_SPEC-primary-of-a-trial",
        ),
        pytest.param(
            {"CLUSTER_SPEC": spec(POOLS | EVALUATORS | {"workerpool2": []}, "workerpool1", 1, environment="cloud")},
            several(2, POOL_ADDRESSES, "CLUSTER_SPEC"),
            id="CLUSTER_SPEC-evaluators-do-not-count",
        ),
        pytest.param(
            {"TF_CONFIG": spec(VERTEX, "worker", 1), "CLUSTER_SPEC": spec(POOLS, "workerpool1", 1)},
            several(2, VERTEX_ADDRESSES, "TF_CONFIG"),
            id="TF_CONFIG-wins",
        ),
        pytest.param(
            {"TF_CONFIG": "{}", "CLUSTER_SPEC": spec(POOLS, "workerpool1", 0)},
            several(1, POOL_ADDRESSES, "CLUSTER_SPEC"),
            id="TF_CONFIG-without-cluster-does-not-win",
        ),
        pytest.param(
            {"TF_CONFIG": spec({"worker": TUTORIAL}, "worker", 1)}, several(1, TUTORIAL, "TF_CONFIG"), id="tutorial"
        ),
        pytest.param(
            {"TF_CONFIG": spec({"worker": TUTORIAL}, "worker", "1")}, several(1, TUTORIAL, "TF_CONFIG"), id="index-text"
        ),
        pytest.param(
            {"TF_CONFIG": spec({"worker": ["[::1]:1", "10.0.0.2:65535"]}, "worker", 0)},
            several(0, ("[::1]:1", "10.0.0.2:65535"), "TF_CONFIG"),
            id="numeric-addresses",
        ),
        pytest.param(
            {"TF_CONFIG": spec(TFJOB, "worker", 0, environment="cloud")},
            several(1, TFJOB_ADDRESSES, "TF_CONFIG"),
            id="TFJob",
        ),
        pytest.param(
            {"TF_CONFIG": spec(TFJOB | {"evaluator": ["test-tfjob-evaluator-0.ns3.svc:2222"]}, "chief", 0)},
            several(0, TFJOB_ADDRESSES, "TF_CONFIG"),
            id="TFJob-evaluator-does-not-count",
        ),
        pytest.param({"JOB_COMPLETION_INDEX": "0"}, single("an Indexed Job of one pod"), id="Indexed-Job-of-one-pod"),
        pytest.param({"TRAINER_HOSTS": "1"}, single("TRAINER_HOSTS"), id="one-host-without-index"),
        pytest.param(
            {**JOBSET, "TRAINER_HOSTS": "1", "JOB_COMPLETION_INDEX": "0"},
            single("TRAINER_HOSTS"),
            id="JobSet-of-one-host",
        ),
        pytest.param(
            {**INDEXED_JOB, "JOB_COMPLETION_INDEX": "2", "TRAINER_PORT": "3389"},
            several(2, [f"example-job-{i}.headless-svc:3389" for i in range(3)], "Indexed Job"),
            id="Indexed-Job",
        ),
        pytest.param(
            {**JOBSET, "JOB_COMPLETION_INDEX": "3"},
            several(3, [f"pytorch-workers-0-{i}.pytorch:2222" for i in range(4)], "JobSet"),
            id="JobSet",
        ),
        pytest.param(  # kubernetes-sigs/jobset, examples/simple/jobset-with-network.yaml
            {
                "TRAINER_HOSTS": "2",
                "JOBSET_NAME": "network-jobset",
                "REPLICATED_JOB_NAME": "workers",
                "JOB_INDEX": "0",
                "JOB_COMPLETION_INDEX": "0",
                "TRAINER_SERVICE": "example",
            },
            several(
                0, ["network-jobset-workers-0-0.example:2222", "network-jobset-workers-0-1.example:2222"], "JobSet"
            ),
            id="JobSet-with-a-subdomain",
        ),
        pytest.param(
            {**TRAINJOB, "JOB_COMPLETION_INDEX": "1"},
            several(1, ["cats-node-0-0.cats:2222", "cats-node-0-1.cats:2222"], "TrainJob"),
            id="TrainJob",
        ),
        pytest.param(SLURM, several(1, ["gpu09:11872", "gpu10:11873"], "Slurm"), id="Slurm-step-not-job"),
        pytest.param(
            {**SLURM, "TRAINER_PORT": "3000"}, several(1, ["gpu09:3000", "gpu10:3001"], "Slurm"), id="Slurm-port"
        ),
        pytest.param(  # --distribution=arbitrary
            {**SLURM, "SLURM_PROCID": "0"}, several(1, ["gpu09:11872", "gpu10:11873"], "Slurm"), id="Slurm-task-order"
        ),
        pytest.param(
            {**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": "gpu08", "SLURM_NODEID": "0"},
            single("a Slurm step of one task"),
            id="Slurm-one-task",
        ),
        pytest.param(
            {**SLURM_BATCH, "SLURM_JOB_NUM_NODES": "1"}, single("a Slurm job without srun"), id="Slurm-one-node-no-srun"
        ),
        pytest.param(
            {"SLURM_JOB_ID": "5", "SLURM_JOB_NUM_NODES": "4"}, single("a Slurm job without srun"), id="Slurm-salloc"
        ),
        pytest.param(
            {**SLURM, "TF_CONFIG": spec({"worker": TUTORIAL}, "worker", 1)},
            several(1, TUTORIAL, "TF_CONFIG"),
            id="TF_CONFIG-wins-in-Slurm",
        ),
        pytest.param(
            {**SLURM, **TRAINJOB, "JOB_COMPLETION_INDEX": "1"},
            several(1, ["cats-node-0-0.cats:2222", "cats-node-0-1.cats:2222"], "TrainJob"),
            id="TrainJob-wins-in-Slurm",
        ),
    ],
)
def test_each_platform_is_read(environment, expected):
    assert cluster.resolve(environment) == expected


@pytest.mark.parametrize(
    ("environment", "texts"),
    [
        pytest.param(
            {"TF_CONFIG": "{'cluster': 1}"}, ["TF_CONFIG is", "{'cluster': 1}", "expected JSON"], id="no-json"
        ),
        pytest.param({"CLUSTER_SPEC": "[1]"}, ["CLUSTER_SPEC is '[1]'", "JSON object"], id="no-object"),
        pytest.param({"TF_CONFIG": '{"cluster": ["a:1"]}'}, ['cluster ["a:1"]', "two JSON objects"], id="cluster-list"),
        pytest.param({"TF_CONFIG": '{"task": "worker"}'}, ['task "worker"', "two JSON objects"], id="task-text"),
        pytest.param(
            {"TF_CONFIG": spec({"worker": "a:1"}, "worker", 0)}, ['"a:1"', "lists of addresses"], id="no-list"
        ),
        pytest.param(
            {"TF_CONFIG": spec({"tpu": ["a:1"]}, "tpu", 0)}, ['"tpu"', "chief, master, worker"], id="unknown-type"
        ),
        pytest.param({"TF_CONFIG": spec({"worker": []}, "worker", 0)}, ["that has addresses"], id="no-addresses"),
        pytest.param({"TF_CONFIG": spec(VERTEX, "master", 0)}, ["task.type is 'master'"], id="type-not-in-cluster"),
        pytest.param({"TF_CONFIG": json.dumps({"cluster": VERTEX})}, ["task.type is 'None'"], id="no-task"),
        pytest.param({"TF_CONFIG": spec(VERTEX, ["chief"], 0)}, ["task.type is \"['chief']\""], id="type-is-a-list"),
        pytest.param(
            {"TF_CONFIG": spec(VERTEX, "worker", 2)}, ["task.index is 2", "from 0 to 1"], id="index-too-large"
        ),
        pytest.param({"TF_CONFIG": spec(VERTEX, "worker", -1)}, ["task.index is -1"], id="index-negative"),
        pytest.param({"TF_CONFIG": spec(VERTEX, "worker", "one")}, ["task.index is 'one'"], id="index-no-number"),
        pytest.param({"TF_CONFIG": spec(VERTEX, "worker", True)}, ["task.index is True"], id="index-true"),
        pytest.param({"TF_CONFIG": spec(VERTEX, "worker", None)}, ["task.index is None"], id="index-missing"),
        pytest.param({"TF_CONFIG": spec({"worker": ["a", "b:1"]}, "worker", 0)}, ["'a'", "host:port"], id="no-port"),
        pytest.param({"TF_CONFIG": spec({"worker": ["a:0", "b:1"]}, "worker", 0)}, ["'a:0'", "host:port"], id="port-0"),
        pytest.param(
            {"TF_CONFIG": spec({"worker": ["a:65536", "b:1"]}, "worker", 0)}, ["'a:65536'"], id="port-too-large"
        ),
        pytest.param({"TF_CONFIG": spec({"worker": [":1", "b:1"]}, "worker", 0)}, ["':1'"], id="no-host"),
        pytest.param({"TF_CONFIG": spec({"worker": ["grpc://a:1", "b:1"]}, "worker", 0)}, ["'grpc://a:1'"], id="a-url"),
        pytest.param(
            {"TF_CONFIG": spec({"worker": [1, "b:1"]}, "worker", 0)}, ["1 is not an address"], id="address-number"
        ),
        pytest.param(
            {"TF_CONFIG": spec({"worker": ["a:1", "a:1"]}, "worker", 0)}, ["'a:1' is listed twice"], id="duplicate"
        ),
        pytest.param(
            {"TF_CONFIG": spec({"chief": ["a:1", "b:1"]}, "chief", 0)}, ["expected one chief"], id="two-chiefs"
        ),
        pytest.param(
            {"TF_CONFIG": spec({"chief": ["a:1"], "master": ["b:1"]}, "chief", 0)}, ["one chief"], id="chief-and-master"
        ),
        pytest.param({"TF_CONFIG": spec({}, "worker", 1)}, ["cluster of all workers"], id="index-without-cluster"),
        pytest.param(  # what a TFJob with enableDynamicWorker writes
            {"TF_CONFIG": '{"sparseCluster": {"worker": {"0": "a:1"}}, "task": {"type": "worker", "index": 0}}'},
            ["cluster of all workers", "enableDynamicWorker"],
            id="sparse-cluster",
        ),
        pytest.param(
            {"TF_CONFIG": spec(VERTEX | {"ps": ["training-workerpool2-ab-0:2222"]}, "worker", 0)},
            ["training-workerpool2-ab-0:2222", "uses neither parameter servers"],
            id="Vertex-example-with-ps",
        ),
        pytest.param(
            {"TF_CONFIG": spec({"ps": ["ps1:2222", "ps2:2222"], "worker": ["worker1:2222"]}, "ps", 1)},
            ["uses neither parameter servers"],
            id="TFJob-ps",
        ),
        pytest.param(
            {"CLUSTER_SPEC": spec(POOLS | SERVERS | EVALUATORS, "workerpool0", 0)},
            ["cmle-training-workerpool2-ab-1:2222", "Reduction Server", "worker pool 2"],
            id="CLUSTER_SPEC-example-with-ps",
        ),
        pytest.param({"TF_CONFIG": spec(VERTEX, "evaluator", 0)}, ["no evaluator is needed"], id="Vertex-evaluator"),
        pytest.param({"TF_CONFIG": spec({}, "evaluator", 0)}, ["no evaluator is needed"], id="evaluator-alone"),
        pytest.param(
            {"TF_CONFIG": spec(TFJOB | {"evaluator": ["e:2222"]}, "evaluator", 0)},
            ["no evaluator"],
            id="TFJob-evaluator",
        ),
        pytest.param(
            {"CLUSTER_SPEC": spec(POOLS | EVALUATORS, "workerpool3", 2)}, ["no evaluator"], id="CLUSTER_SPEC-evaluator"
        ),
        pytest.param(
            {"JOB_COMPLETION_INDEX": "1"},
            ["JOB_COMPLETION_INDEX='1'", "expected TRAINER_HOSTS too"],
            id="only-an-index",
        ),
        pytest.param(
            {"JOB_COMPLETION_INDEX": "0", "TRAINER_JOB": "j"}, ["TRAINER_JOB='j'", "TRAINER_HOSTS too"], id="no-hosts"
        ),
        pytest.param({"TRAINER_SERVICE": "s"}, ["TRAINER_SERVICE='s'", "TRAINER_HOSTS too"], id="only-a-service"),
        pytest.param({**INDEXED_JOB, "TRAINER_HOSTS": "0"}, ["TRAINER_HOSTS is '0'", "from 1"], id="hosts-0"),
        pytest.param({**INDEXED_JOB, "TRAINER_HOSTS": "two"}, ["TRAINER_HOSTS is 'two'", "a number"], id="hosts-text"),
        pytest.param(INDEXED_JOB, ["JOB_COMPLETION_INDEX is ''", "completionMode Indexed"], id="no-index"),
        pytest.param(
            {**INDEXED_JOB, "JOB_COMPLETION_INDEX": "3"},
            ["JOB_COMPLETION_INDEX is '3'", "from 0 to 2"],
            id="index-3-of-3",
        ),
        pytest.param(
            {"TRAINER_HOSTS": "1", "JOB_COMPLETION_INDEX": "1"},
            ["JOB_COMPLETION_INDEX is '1'", "to 0"],
            id="index-1-of-1",
        ),
        pytest.param(
            {"TRAINER_HOSTS": "2", "JOB_COMPLETION_INDEX": "0"},
            ["exactly one of TRAINJOB_NAME, JOBSET_NAME"],
            id="no-name",
        ),
        pytest.param(
            {**INDEXED_JOB, **TRAINJOB, "JOB_COMPLETION_INDEX": "0"}, ["exactly one of TRAINJOB_NAME"], id="two-names"
        ),
        pytest.param(
            {"TRAINER_HOSTS": "2", "TRAINER_JOB": "j", "JOB_COMPLETION_INDEX": "0"},
            ["TRAINER_JOB='j'", "expected TRAINER_SERVICE too"],
            id="no-service",
        ),
        pytest.param(
            {**JOBSET, "REPLICATED_JOB_NAME": "", "JOB_COMPLETION_INDEX": "0"},
            ["JOBSET_NAME='pytorch'", "expected REPLICATED_JOB_NAME too"],
            id="no-replicated-job",
        ),
        pytest.param(
            {**JOBSET, "JOB_INDEX": "1", "JOB_COMPLETION_INDEX": "0"},
            ["JOB_INDEX='1'", "one replica"],
            id="two-child-jobs",
        ),
        pytest.param(
            {**JOBSET, "JOB_INDEX": "1", "TRAINER_HOSTS": "1", "JOB_COMPLETION_INDEX": "0"},
            ["JOB_INDEX='1'", "one replica"],
            id="two-child-jobs-of-one-pod",
        ),
        pytest.param(
            {**TRAINJOB, "JOB_COMPLETION_INDEX": "0", "TRAINER_PORT": "tcp://10.0.0.11:80"},
            ["TRAINER_PORT is 'tcp://10.0.0.11:80'", "a Service called trainer"],
            id="port-of-a-service",
        ),
        pytest.param(
            {**TRAINJOB, "JOB_COMPLETION_INDEX": "0", "TRAINJOB_NAME": "my job"},
            ["'my job-node-0-0.my job:2222' is not an address"],
            id="name-with-a-space",
        ),
        pytest.param(
            SLURM_BATCH, ["SLURM_JOB_NUM_NODES='4'", "only the first node", "srun --ntasks-per-node=1"], id="no-srun"
        ),
        pytest.param(
            {**SLURM, "SLURM_STEP_NUM_TASKS": "4"},
            ["SLURM_STEP_NUM_TASKS='4'", "one task per node", "srun --ntasks-per-node=1"],
            id="Slurm-two-tasks-per-node",
        ),
        pytest.param(
            {**SLURM, "SLURM_NODEID": "2"}, ["SLURM_NODEID is '2'", "from 0 to 1"], id="Slurm-index-too-large"
        ),
        pytest.param(  # sbatch in a shell of another job passes that job's variables on to a script without srun
            {**SLURM_BATCH, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "cpu[1-2]"},
            ["SLURMD_NODENAME='gpu07'", "those of another step"],
            id="Slurm-variables-of-another-step",
        ),
        pytest.param(
            {**SLURM, "SLURM_STEP_NODELIST": "gpu[9-"}, ["'gpu[9-' is not a node list"], id="Slurm-open-bracket"
        ),
        pytest.param({**SLURM, "SLURM_STEP_NODELIST": ""}, ["'' is not a node list"], id="Slurm-no-nodes"),
        pytest.param(
            {**SLURM, "TRAINER_PORT": "65535"}, ["'gpu10:65536' is not an address"], id="Slurm-port-too-large"
        ),
    ],
)
def test_an_incomplete_or_wrong_cluster_is_a_one_line_error(environment, texts):
    with pytest.raises(UserError) as caught:
        cluster.resolve(environment)
    message = str(caught.value)
    assert "\n" not in message
    assert [text for text in texts if text not in message] == [], message


# https://slurm.schedmd.com/scontrol.html, "show hostnames"
@pytest.mark.parametrize(
    ("node_list", "names"),
    [
        ("login", ["login"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("n[1,3-4],login,gpu[08-11]-ib", ["n1", "n3", "n4", "login", "gpu08-ib", "gpu09-ib", "gpu10-ib", "gpu11-ib"]),
        ("rack[0-1]n[09-10]", ["rack0n09", "rack0n10", "rack1n09", "rack1n10"]),
        ("10.0.0.[7,9]", ["10.0.0.7", "10.0.0.9"]),
        ("n[099-101]", ["n099", "n100", "n101"]),
    ],
)
def test_a_node_list_of_slurm_is_expanded(node_list, names):
    environment = {**SLURM, "SLURM_STEP_NODELIST": node_list, "SLURM_STEP_NUM_TASKS": str(len(names) + 1)}
    environment["SLURM_STEP_NODELIST"] += ",last"
    environment |= {"SLURM_NODEID": "0", "SLURMD_NODENAME": names[0]}
    addresses = cluster.resolve(environment).addresses
    assert [address.rpartition(":")[0] for address in addresses] == [*names, "last"]


def test_jobs_of_slurm_with_successive_numbers_use_other_ports():
    ports = set()
    for job in range(20000, 21250):
        addresses = cluster.resolve({**SLURM, "SLURM_JOB_ID": str(job)}).addresses
        ports |= {int(address.rpartition(":")[2]) for address in addresses}
    assert len(ports) == 2 * 1250
    assert max(ports) < 32768  # the first ephemeral port of Linux


TASKS = {
    "Vertex": [{"TF_CONFIG": spec(VERTEX, *task)} for task in (("chief", 0), ("worker", 0), ("worker", 1))],
    "CLUSTER_SPEC": [
        {"CLUSTER_SPEC": spec(POOLS, *task)} for task in (("workerpool0", 0), ("workerpool1", 0), ("workerpool1", 1))
    ],
    "workers-only": [{"TF_CONFIG": spec({"worker": TUTORIAL}, "worker", i)} for i in range(2)],
    "Indexed-Job": [{**INDEXED_JOB, "JOB_COMPLETION_INDEX": str(i)} for i in range(3)],
    "JobSet": [{**JOBSET, "JOB_COMPLETION_INDEX": str(i)} for i in range(4)],
    "TrainJob": [{**TRAINJOB, "JOB_COMPLETION_INDEX": str(i)} for i in range(2)],
    "Slurm": [{**SLURM, "SLURM_NODEID": str(i), "SLURMD_NODENAME": name} for i, name in enumerate(("gpu09", "gpu10"))],
}


@pytest.mark.parametrize("environments", TASKS.values(), ids=TASKS.keys())
def test_all_workers_agree_on_addresses_and_chief(environments):
    clusters = [cluster.resolve(environment) for environment in environments]

    assert {one.workers for one in clusters} == {len(environments)}
    assert len({one.addresses for one in clusters}) == 1
    assert [one.index for one in clusters] == list(range(len(environments)))
    assert [one.is_chief for one in clusters] == [True] + [False] * (len(environments) - 1)


@pytest.mark.parametrize("environments", TASKS.values(), ids=TASKS.keys())
def test_tf_config_describes_the_same_cluster(environments):
    for environment in environments:
        before = cluster.resolve(environment)
        variables = cluster.tensorflow_environment(before)
        text = variables["TF_CONFIG"]
        assert list(json.loads(text)["cluster"]) == ["worker"]
        assert variables["no_grpc_proxy"].split(",") == [address.rpartition(":")[0] for address in before.addresses]
        assert cluster.resolve({"TF_CONFIG": text}) == dataclasses.replace(before, source="TF_CONFIG")


def test_tf_config_of_a_single_worker_has_no_cluster():
    single = cluster.resolve({"TF_CONFIG": spec({"chief": ["a:1"]}, "chief", 0)})
    assert cluster.tensorflow_environment(single) == {"TF_CONFIG": "{}"}


def test_a_port_in_use_is_an_error():
    with socket.create_server(("", 0)) as listener:
        port = listener.getsockname()[1]
        two = several(1, ("localhost:1", f"localhost:{port}"), "TF_CONFIG")
        with pytest.raises(UserError, match=f"Port {port} of worker 1 .*Address already in use.*TRAINER_PORT"):
            cluster.check_addresses(two, timeout_secs=0)

    cluster.check_addresses(two, timeout_secs=0)
    with socket.create_server(("", port)):  # the check itself does not occupy the port
        pass


def free_port():
    with socket.create_server(("", 0)) as listener:
        return listener.getsockname()[1]


def test_a_name_that_never_resolves_is_an_error_after_the_timeout():
    two = several(0, (f"localhost:{free_port()}", "does-not-exist.invalid:2222"), "JobSet")
    start = time.monotonic()
    with pytest.raises(
        UserError, match=r"does-not-exist\.invalid of worker 1 \(from JobSet\) did not resolve in 1\.2 s"
    ):
        cluster.check_addresses(two, timeout_secs=1.2)
    assert time.monotonic() - start >= 1.2


def test_a_name_too_long_for_dns_is_an_error():
    two = several(0, (f"localhost:{free_port()}", f"{'a' * 64}.example:2222"), "JobSet")
    with pytest.raises(UserError, match="did not resolve"):
        cluster.check_addresses(two, timeout_secs=0)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]"])
def test_host_names_and_ip_addresses_resolve(host):
    two = several(0, (f"my-own-name-need-not-resolve.invalid:{free_port()}", f"{host}:2222"), "TF_CONFIG")
    cluster.check_addresses(two, timeout_secs=0)


def test_a_single_worker_has_no_addresses_to_check():
    cluster.check_addresses(single("no cluster"), timeout_secs=0)
