"""The specifications in deploy/vertex: parsed into the protos of Vertex AI and submitted by its clients to an emulator."""

import copy
import importlib.util
import json
import os
import pathlib
import re
import shlex
import shutil
import string
import subprocess
import sys
import tempfile
import threading
import time

import pytest
from absl import flags

from tests.support import trainer_flags, written_job
from tests.support.bucket import upload as upload_folder
from tests.support.paths import ROOT
from trainer import serve, task
from trainer.errors import UserError
from trainer.runtime import cluster

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed: pip install '.[dev]'")
pytest.importorskip(
    "google.cloud.aiplatform_v1", reason="google-cloud-aiplatform is not installed: pip install '.[dev]'"
)

from google.protobuf import json_format  # noqa: E402

from tests.support import vertex_emulator  # noqa: E402 - after the check that its packages are installed

VERTEX = ROOT / "deploy" / "vertex"
SPECS = sorted(path.name for path in VERTEX.glob("*.yaml"))
MACHINES = dict.fromkeys(SPECS, 1) | {"several-machines.yaml": 4}
# Accelerators of each machine type: https://cloud.google.com/compute/docs/gpus
ACCELERATORS = {"g2-standard-8": ("NVIDIA_L4", 1), "a2-highgpu-8g": ("NVIDIA_TESLA_A100", 8)}


sys.path.append(str(ROOT / "deploy"))  # as in `python deploy/submit.py`
import vertex_ai  # noqa: E402


@pytest.fixture(scope="module")
def submit():
    module_spec = importlib.util.spec_from_file_location("submit", ROOT / "deploy" / "submit.py")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def settings(submit):
    return submit.read_settings((VERTEX / "settings.env").read_text(), {})


def run_submit(*arguments, **environment) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "deploy/submit.py", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        check=False,
    )


def wait_until(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


def key_paths(value, path=()):
    if isinstance(value, dict):
        for name, item in value.items():
            yield (*path, name)
            yield from key_paths(item, (*path, name))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from key_paths(item, (*path, i))


@pytest.mark.parametrize("name", SPECS)
def test_every_field_of_a_specification_is_in_the_parsed_proto(name, submit, settings):
    text = (VERTEX / name).read_text()
    job = submit.parse(text, settings, name)
    fields = yaml.safe_load(string.Template(text).substitute(settings))
    parsed = json_format.MessageToDict(type(job).pb(job))
    known = set(key_paths(parsed if "studySpec" in fields else parsed["jobSpec"]))
    # gcloud accepts camelCase only. protobuf omits a field with the default value, such as a minValue of 0.
    zeros = {("studySpec", "parameters", i, "doubleValueSpec", "minValue") for i in range(5)}
    assert {path for path in key_paths(fields) if path not in known} <= zeros


@pytest.mark.parametrize("name", SPECS)
def test_an_unknown_field_anywhere_is_rejected(name, submit, settings):
    original = yaml.safe_load((VERTEX / name).read_text())
    objects = {path[:-1] for path in key_paths(original) if isinstance(path[-1], str)}
    assert len(objects) >= 7
    for path in objects:
        fields = copy.deepcopy(original)
        target = fields
        for step in path:
            target = target[step]
        target["unknownField"] = 1
        with pytest.raises(UserError, match="unknownField"):
            submit.parse(yaml.safe_dump(fields), settings, name)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("one-gpu.yaml", "NVIDIA_L4", "NVIDIA_L5"),
        ("one-gpu.yaml", "86400s", "24h"),
        ("one-gpu.yaml", "replicaCount: 1", "replicaCount: one"),
        ("one-gpu.yaml", "${IMAGE}", "${IMAGES}"),
        ("one-gpu.yaml", "${IMAGE}", "$ IMAGE"),
        ("one-gpu.yaml", "machineSpec:", "machineSpec: ["),
        ("spot.yaml", "strategy: SPOT", "strategy: SPOTTY"),
        ("flex-start.yaml", "strategy: FLEX_START", "strategy: DWS_FLEX_START"),
        ("reservation.yaml", "SPECIFIC_RESERVATION", "SPECIFIC"),
        ("tuning.yaml", "goal: MAXIMIZE", "goal: MAX"),
        ("tuning.yaml", "scaleType: UNIT_LOG_SCALE", "scaleType: LOG"),
    ],
)
def test_an_error_in_a_specification_is_rejected(name, old, new, submit, settings):
    text = (VERTEX / name).read_text()
    assert old in text
    with pytest.raises(UserError):
        submit.parse(text.replace(old, new), settings, name)


def environments(job, spec) -> list[dict[str, str]]:
    """The variables that Vertex AI sets on each machine of the job, in its two forms.

    https://cloud.google.com/vertex-ai/docs/training/distributed-training#cluster-variables
    https://cloud.google.com/vertex-ai/docs/training/code-requirements#environment-variables
    """
    base = spec.base_output_directory.output_uri_prefix + (
        "" if hasattr(job, "job_spec") else "/7"
    )  # 7: the number of a trial
    folders = {
        "AIP_MODEL_DIR": f"{base}/model/",
        "AIP_CHECKPOINT_DIR": f"{base}/checkpoints/",
        "AIP_TENSORBOARD_LOG_DIR": f"{base}/logs/",
    }
    pools = {
        f"workerpool{number}": [f"cmle-training-workerpool{number}-abc-{i}:2222" for i in range(pool.replica_count)]
        for number, pool in enumerate(spec.worker_pool_specs)
    }
    variables = []
    for pool, addresses in pools.items():
        for i in range(len(addresses)):
            cluster_spec = {"cluster": pools, "task": {"type": pool, "index": i}, "environment": "cloud"}
            role = "chief" if pool == "workerpool0" else "worker"
            tf_config = {
                "cluster": {"chief": pools["workerpool0"], "worker": pools.get("workerpool1", [])},
                "task": {"type": role, "index": i},
            }
            both = {"CLUSTER_SPEC": json.dumps(cluster_spec), "TF_CONFIG": json.dumps(tf_config)}
            variables += [folders | both, folders | {"CLUSTER_SPEC": both["CLUSTER_SPEC"]}]
    return variables


@pytest.mark.parametrize("name", SPECS)
def test_the_trainer_accepts_arguments_and_environment_of_vertex(name, submit, settings):
    job = submit.parse((VERTEX / name).read_text(), settings, name)
    pools = submit.custom_job_spec(job).worker_pool_specs
    assert sum(pool.replica_count for pool in pools) == MACHINES[name]
    assert pools[0].replica_count == 1, "Vertex AI requires one machine in the first pool"
    for pool in pools:
        machine = pool.machine_spec
        assert ACCELERATORS[machine.machine_type] == (machine.accelerator_type.name, machine.accelerator_count)
        assert pool.container_spec.args == pools[0].container_spec.args, "all workers must run the same job"
        assert "--require_gpu" in pool.container_spec.args
    config = trainer_flags.parse(list(pools[0].container_spec.args))
    variables = environments(job, submit.custom_job_spec(job))
    roles = [cluster.resolve(environment) for environment in variables]
    assert {role.workers for role in roles} == {MACHINES[name]}
    assert sorted({role.index for role in roles}) == list(range(MACHINES[name]))
    assert len({role.addresses for role in roles}) == 1
    complete = task.with_environment(config, variables[0])
    base = "gs://my-bucket/jobs/first" + ("/7" if name == "tuning.yaml" else "")
    assert complete.job_dir == base
    assert complete.model_dir == f"{base}/model"
    assert config.batch_size % sum(pool.machine_spec.accelerator_count * pool.replica_count for pool in pools) == 0


@pytest.mark.parametrize("name", sorted(set(SPECS) - {"tuning.yaml"}))
def test_the_learning_rate_follows_the_batch(name, submit, settings):
    """Measured: 3e-4 for 32 images (docs/recipe.md). LAMB's rule for other batches is the square root."""
    job = submit.parse((VERTEX / name).read_text(), settings, name)
    config = trainer_flags.parse(list(job.job_spec.worker_pool_specs[0].container_spec.args))
    assert config.recipe == "finetune"
    assert config.learning_rate == pytest.approx(3e-4 * (config.batch_size / 32) ** 0.5, rel=0.02)


def test_jobs_that_wait_for_a_machine_say_how_long(submit, settings):
    for name, strategy in (("spot.yaml", "SPOT"), ("flex-start.yaml", "FLEX_START")):
        scheduling = submit.parse((VERTEX / name).read_text(), settings, name).job_spec.scheduling
        assert scheduling.strategy.name == strategy
        assert scheduling.max_wait_duration.total_seconds() > 0
        assert scheduling.timeout.total_seconds() <= 7 * 86400  # the limit of flexible start
    spot = submit.parse((VERTEX / "spot.yaml").read_text(), settings, "spot.yaml")
    assert spot.job_spec.scheduling.restart_job_on_worker_restart


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("wrong", ["--epoch=5", "--epochs=many", "--optimizer=adamm"])
def test_a_wrong_flag_anywhere_is_rejected(name, wrong, submit, settings):
    job = submit.parse((VERTEX / name).read_text(), settings, name)
    for pool in submit.custom_job_spec(job).worker_pool_specs:
        with pytest.raises(flags.Error):
            trainer_flags.parse([*pool.container_spec.args, wrong])


def test_tuned_parameters_are_flags_that_accept_their_bounds(submit, settings):
    job = submit.parse((VERTEX / "tuning.yaml").read_text(), settings, "tuning.yaml")
    (pool,) = job.trial_job_spec.worker_pool_specs
    for end in (min, max):
        values = {}
        for parameter in job.study_spec.parameters:
            if "double_value_spec" in parameter:
                bounds = (parameter.double_value_spec.min_value, parameter.double_value_spec.max_value)
            else:
                bounds = [int(value) for value in parameter.discrete_value_spec.values]
            values[parameter.parameter_id] = end(bounds)
        config = trainer_flags.parse([*pool.container_spec.args, *(f"--{k}={v}" for k, v in values.items())])
        assert {name: getattr(config, name) for name in values} == values


@pytest.mark.parametrize("name", ["several-machines.yaml", "tuning.yaml"])
def test_the_vertex_client_submits_the_job(name, settings):
    with vertex_emulator.run() as (url, requests):
        done = run_submit("vertex", f"--config=deploy/vertex/{name}", f"--api_endpoint={url}", RUN="second")
    assert done.returncode == 0, done.stderr
    (request,) = requests
    kind = "customJobs" if name == "several-machines.yaml" else "hyperparameterTuningJobs"
    assert request.path == f"/v1/projects/my-project/locations/us-central1/{kind}"
    assert request.message.display_name == "second"
    spec = request.message.job_spec if kind == "customJobs" else request.message.trial_job_spec
    assert spec.base_output_directory.output_uri_prefix == "gs://my-bucket/jobs/second"
    assert done.stdout.startswith(f"projects/my-project/locations/us-central1/{kind}/1000\nhttps://console.cloud")


def test_a_dry_run_submits_nothing_and_prints_the_job(submit, settings):
    with vertex_emulator.run() as (url, requests):
        done = run_submit("vertex", "--config=deploy/vertex/spot.yaml", f"--api_endpoint={url}", "--dry_run")
    assert done.returncode == 0
    assert requests == []
    printed = yaml.safe_load(done.stdout)
    job = submit.parse((VERTEX / "spot.yaml").read_text(), settings, "spot.yaml")
    assert printed == json_format.MessageToDict(type(job).pb(job))


@pytest.mark.slow
def test_each_user_error_is_one_line_with_exit_code_2(tmp_path):
    text = (VERTEX / "one-gpu.yaml").read_text()
    wrong_flag = tmp_path / "wrong.yaml"
    wrong_flag.write_text(text.replace("--recipe=finetune", "--recipes=finetune"))
    empty = tmp_path / "empty.env"
    empty.write_text("REGION=us-central1\n")
    with vertex_emulator.run(reject_with=403) as (url, _):
        cases = {
            "pass `vertex`": run_submit("--dry_run"),
            "--config is not set": run_submit("vertex"),
            "cannot be read": run_submit("vertex", "--config=nowhere.yaml"),
            "'recipes'": run_submit("vertex", f"--config={wrong_flag}", "--dry_run"),
            "pass one or more of upload, deploy, batch": run_submit("vertex", "--config=x", "--then=uplaod"),
            "require each other": run_submit("vertex", "--config=x", "--then=batch"),
            "PROJECT has no value": run_submit("vertex", f"--config={wrong_flag}", f"--settings={empty}"),
            "rejected for the test": run_submit(
                "vertex", "--config=deploy/vertex/one-gpu.yaml", f"--api_endpoint={url}"
            ),
        }
    for expected, done in cases.items():
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        assert expected in next(line for line in done.stderr.splitlines() if line.startswith("error: "))


def test_settings_that_a_shell_reads_differently_are_rejected(submit):
    assert submit.read_settings("# x\n\nA=b-c/d:1\n", {"A": ""}) == {"A": "b-c/d:1"}
    assert submit.read_settings("A=b\n", {"A": "c"}) == {"A": "c"}
    for line in ("A=$(rm -rf x)", "A='b'", "A = b", "export A=b", "a=b"):
        with pytest.raises(UserError, match="Line 1"):
            submit.read_settings(line, {})


def gcloud(url: str, folder: pathlib.Path, *arguments) -> subprocess.CompletedProcess:
    """Runs gcloud against `url`, with its configuration and token in `folder`."""
    program = shutil.which("gcloud")
    if not program:
        pytest.skip("no gcloud on the PATH: https://cloud.google.com/sdk/docs/install")
    (folder / "token").write_text("token-of-the-test\n")
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "CLOUDSDK_CONFIG": str(folder),
        "CLOUDSDK_AUTH_ACCESS_TOKEN_FILE": str(folder / "token"),
        "CLOUDSDK_CORE_PROJECT": "my-project",
        "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
        "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "true",
        "CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK": "true",
        "CLOUDSDK_API_ENDPOINT_OVERRIDES_AIPLATFORM": f"{url}/",
    }
    command = [program, *arguments, "--region=us-central1"]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=120)


@pytest.mark.parametrize("name", SPECS)
def test_gcloud_submits_each_specification(name, settings, tmp_path):
    text = string.Template((VERTEX / name).read_text()).substitute(settings)
    (tmp_path / "job.yaml").write_text(text)
    kind = "hp-tuning-jobs" if name == "tuning.yaml" else "custom-jobs"
    arguments = ["ai", kind, "create", "--display-name=first", f"--config={tmp_path / 'job.yaml'}"]
    with vertex_emulator.run() as (url, requests):
        counts = [] if kind == "custom-jobs" else ["--max-trial-count=20", "--parallel-trial-count=4"]
        done = gcloud(url, tmp_path, *arguments, *counts)
    assert done.returncode == 0, done.stderr
    (request,) = requests
    fields = yaml.safe_load(text)
    sent = json_format.MessageToDict(request.message)
    sent = sent if kind == "hp-tuning-jobs" else sent["jobSpec"]
    for path in key_paths(fields):
        if path[-1] in ("imageUri", "args", "outputUriPrefix", "timeout", "strategy", "machineType"):
            expected, actual = fields, sent
            for step in path:
                expected, actual = expected[step], actual[step]
            assert actual == expected, path


def finished_job_dir(bucket_url) -> str:
    """A bucket with the job_dir of a finished run, jobs/second."""
    with tempfile.TemporaryDirectory() as folder:
        upload_folder(written_job.make_job_dir(pathlib.Path(folder)), f"{bucket_url}/jobs/second")
    return str(bucket_url).removeprefix("gs://")


STEPS = ("--then=upload,deploy,batch", "--batch_source=gs://my-bucket/list.txt", "--poll_secs=0.05")


@pytest.mark.slow
def test_a_model_is_uploaded_deployed_and_used_after_the_job_once_over_several_calls(bucket_url, tmp_path):
    bucket = finished_job_dir(bucket_url)
    service = vertex_emulator.Service(operation_reads=2)
    arguments = ("vertex", "--config=deploy/vertex/one-gpu.yaml", *STEPS)
    with vertex_emulator.run(service=service) as (url, requests):
        done = run_submit(*arguments, f"--api_endpoint={url}", RUN="second", BUCKET=bucket)
        assert done.returncode == 0, done.stderr
        paths = [request.path.rpartition("us-central1/")[2] for request in requests]
        assert paths == [
            "customJobs",
            "models:upload",
            "endpoints",
            "endpoints/pictures:deployModel",
            "batchPredictionJobs",
        ]
        again = run_submit(*arguments, f"--api_endpoint={url}", RUN="second", BUCKET=bucket)
        assert (again.returncode, again.stdout) == (0, done.stdout), again.stderr
        assert len(requests) == 5, "the second call created something"
        command = next(line for line in done.stdout.splitlines() if "undeploy-model" in line)
        removed = gcloud(url, tmp_path, *[word for word in command.split()[1:] if not word.startswith("--region")])
        assert removed.returncode == 0, removed.stderr
    _, upload, _, deployment, batch = (request.message for request in requests[:5])
    model, job_dir = upload.model, f"gs://{bucket}/jobs/second"
    assert model.artifact_uri == f"{job_dir}/model"
    assert list(model.container_spec.command) == ["python3", "-m", "trainer.serve"]
    assert model.container_spec.image_uri.endswith("/picture-trainer:0.1.0")
    assert dict(model.labels) == {
        "run": "second",
        "training-job": "1000",
        "backbone": "resnet50",
        "classes": "4",
        "val-accuracy": "0-7500",
    }
    assert "Validation accuracy 0.7500 (0.409 to 0.929) of 8 images" in model.description
    assert f"{job_dir}/model_card.md" in model.description
    assert deployment.deployed_model.model == model.name
    assert dict(deployment.traffic_split) == {"0": 100}
    assert batch.model == model.name
    assert batch.input_config.instances_format == "file-list"
    assert batch.output_config.gcs_destination.output_uri_prefix == f"{job_dir}/batch"
    endpoint = service.resources["projects/my-project/locations/us-central1/endpoints/pictures"]
    assert not endpoint.deployed_models  # after the printed command
    assert f"https://{endpoint.dedicated_endpoint_dns}/v1/{endpoint.name}:predict" in done.stdout
    assert f"{job_dir}/batch/prediction-first" in done.stdout


@pytest.mark.slow
def test_a_call_after_a_kill_continues_the_upload_that_was_started(bucket_url, submit):
    bucket = finished_job_dir(bucket_url)
    service = vertex_emulator.Service(operation_reads=10**6)
    arguments = [sys.executable, "deploy/submit.py", "vertex", "--config=deploy/vertex/one-gpu.yaml", *STEPS]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RUN": "second", "BUCKET": bucket}
    with vertex_emulator.run(service=service) as (url, requests):
        process = subprocess.Popen([*arguments, f"--api_endpoint={url}"], env=environment, cwd=ROOT)
        wait_until(lambda: service.operations, process)
        process.kill()
        process.wait()
        service.operation_reads = 1
        region = vertex_ai.Region("my-project", "us-central1", url)
        (operation,) = service.operations
        threading.Timer(1.0, lambda: region.models.transport.operations_client.get_operation(operation)).start()
        (job,) = [one for name, one in service.resources.items() if "customJobs" in name]
        model = vertex_ai.upload(
            region, job_name=job.name, job_dir=f"gs://{bucket}/jobs/second", image="image", run="second"
        )
    assert model.name.endswith("/models/picture-trainer-1000")
    uploads = [request for request in requests if request.path.endswith(":upload")]
    assert len({request.message.model_id for request in uploads}) == 1
    assert len([name for name in service.resources if "/models/" in name]) == 1


def test_a_job_is_found_by_its_specification_unless_it_failed(submit, settings):
    text = (VERTEX / "one-gpu.yaml").read_text()
    service = vertex_emulator.Service(job_error="The replica workerpool0-0 exited with a non-zero status of 2.")
    with vertex_emulator.run(service=service) as (url, requests):
        region = vertex_ai.Region("my-project", "us-central1", url)

        def find_or_submit(text: str):
            job = submit.parse(text, settings, "one-gpu.yaml")
            vertex_ai.add_specification_label(job)
            return vertex_ai.find_or_submit(region, job)

        first = find_or_submit(text)
        assert find_or_submit(text).name == first.name
        other = find_or_submit(text.replace("--require_gpu", "--norequire_gpu"))
        assert other.name != first.name
        with pytest.raises(UserError, match="FAILED: The replica workerpool0-0 exited"):
            vertex_ai.wait_for_job(region, first, poll_secs=0.01)
        assert find_or_submit(text).name not in (first.name, other.name)
    assert len(requests) == 3


def test_the_model_of_a_tuning_job_is_that_of_its_best_trial(submit, settings):
    job = submit.parse((VERTEX / "tuning.yaml").read_text(), settings, "tuning.yaml")
    for number, value in ((1, 0.8), (2, 0.9), (3, 0.7)):
        measurement = vertex_ai.v1.Measurement(metrics=[{"metric_id": "val_accuracy", "value": value}])
        job.trials.append(vertex_ai.v1.Trial(id=str(number), state="SUCCEEDED", final_measurement=measurement))
    job.trials.append(vertex_ai.v1.Trial(id="4", state="INFEASIBLE"))
    assert vertex_ai.job_dir_of(job) == "gs://my-bucket/jobs/first/2"
    del job.trials[:3]
    with pytest.raises(UserError, match="No trial"):
        vertex_ai.job_dir_of(job)


README = (ROOT / "deploy" / "README.md").read_text().replace("\\\n", " ")
UPLOADS = re.findall(r"^gcloud (ai models upload .*)$", README, re.MULTILINE)


def upload_words(line: str, settings: dict[str, str]) -> list[str]:
    return shlex.split(string.Template(line).safe_substitute(settings))


def test_trainer_serve_accepts_the_environment_of_an_uploaded_model(settings):
    trainer_serve, tf_serving = (upload_words(line, settings) for line in UPLOADS)
    options = dict(
        word.removeprefix("--container-").split("=", 1) for word in trainer_serve if word.startswith("--container-")
    )
    assert options.pop("image-uri") == settings["IMAGE"]
    assert options.pop("command") == "python3,-m,trainer.serve"
    environment = {
        "AIP_HTTP_PORT": options.pop("ports"),
        "AIP_STORAGE_URI": "gs://bucket/model",
        "AIP_PREDICT_ROUTE": options.pop("predict-route"),
        "AIP_HEALTH_ROUTE": options.pop("health-route"),
    }
    assert not options
    assert serve.with_environment({}, set(), environment) == {
        "host": "0.0.0.0",
        "port": 8080,
        "allowed_hosts": ["*"],
        "model_dir": "gs://bucket/model",
        "predict_route": "/predict",
        "health_route": "/health",
    }
    assert any(word.endswith("/training/serving:2.21.0") for word in tf_serving)


@pytest.mark.parametrize(
    ("line", "port"), [*zip(UPLOADS, (8080, 8501), strict=True)], ids=["trainer.serve", "tf-serving"]
)
def test_gcloud_uploads_the_model_with_the_readme_command(tmp_path, settings, line, port):
    arguments = [word for word in upload_words(line, settings) if not word.startswith("--region")]
    with vertex_emulator.run() as (url, requests):
        done = gcloud(url, tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    model = requests[0].message.model
    assert model.artifact_uri == f"gs://{settings['BUCKET']}/jobs/{settings['RUN']}/model"
    assert [one.container_port for one in model.container_spec.ports] == [port]
