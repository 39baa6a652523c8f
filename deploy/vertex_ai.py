"""Jobs, models, endpoints and batch predictions of Vertex AI. Each is created once, found again by a later call, and awaited.

A second call creates nothing twice: models, endpoints and deployments have IDs that follow from the job, which Vertex AI
refuses to use again; jobs and batch predictions have a label with the hash of their specification.
"""

import dataclasses
import functools
import hashlib
import json
import re
import time
import zlib
from collections.abc import Callable, Iterable
from typing import Any

from absl import logging
from google.api_core import exceptions, retry
from google.auth.credentials import AnonymousCredentials
from google.cloud import aiplatform_v1 as v1
from google.protobuf import json_format

from trainer.artifacts import run_record
from trainer.artifacts.job_dir import JobDir
from trainer.artifacts.run_record import RunRecord
from trainer.errors import UserError

SPECIFICATION_LABEL = "specification"
OPERATION_SECS = 3600.0  # the longest that an upload or a deployment is awaited
SERVER_PORT = 8080
_ENDED = {
    v1.JobState.JOB_STATE_SUCCEEDED,
    v1.JobState.JOB_STATE_PARTIALLY_SUCCEEDED,
    v1.JobState.JOB_STATE_FAILED,
    v1.JobState.JOB_STATE_CANCELLED,
    v1.JobState.JOB_STATE_EXPIRED,
}
_NOT_REUSED = {
    v1.JobState.JOB_STATE_FAILED,
    v1.JobState.JOB_STATE_CANCELLING,
    v1.JobState.JOB_STATE_CANCELLED,
    v1.JobState.JOB_STATE_EXPIRED,
}
# For requests that change nothing: failures of the network and of the service, for at most ten minutes.
_RETRY = retry.Retry(timeout=600.0)
# Until a resource that another call creates can be read.
_UNTIL_FOUND = retry.Retry(
    predicate=retry.if_exception_type(exceptions.NotFound), initial=1.0, maximum=30.0, timeout=OPERATION_SECS
)


@dataclasses.dataclass(frozen=True)
class Region:
    """The Vertex AI of a project in a region. `address` is that of the API; '' is Google's, http:// sends no credentials."""

    project: str
    name: str
    address: str = ""

    @property
    def parent(self) -> str:
        """The resource name of the region."""
        return f"projects/{self.project}/locations/{self.name}"

    @functools.cached_property
    def jobs(self) -> Any:
        """The client of the job service."""
        return self._client(v1.JobServiceClient)

    @functools.cached_property
    def models(self) -> Any:
        """The client of the model service."""
        return self._client(v1.ModelServiceClient)

    @functools.cached_property
    def endpoints(self) -> Any:
        """The client of the endpoint service."""
        return self._client(v1.EndpointServiceClient)

    def _client(self, kind: Any) -> Any:
        scheme, _, host = self.address.rpartition("://")
        transport = kind.get_transport_class("rest")(
            host=host or f"{self.name}-aiplatform.googleapis.com",
            url_scheme=scheme or "https",
            credentials=AnonymousCredentials() if scheme == "http" else None,
        )
        return kind(transport=transport)


def add_specification_label(resource: Any) -> None:
    """Labels a job or a batch prediction with the hash of its other fields, by which a later call finds it."""
    fields = json.dumps(json_format.MessageToDict(type(resource).pb(resource)), sort_keys=True)
    resource.labels[SPECIFICATION_LABEL] = hashlib.sha256(fields.encode()).hexdigest()[:40]


def find_or_submit(region: Region, job: Any) -> Any:
    """The job with the specification of `job` that runs or has succeeded; submits it if there is none."""
    is_tuning = isinstance(job, v1.HyperparameterTuningJob)
    listing = region.jobs.list_hyperparameter_tuning_jobs if is_tuning else region.jobs.list_custom_jobs
    found = _newest(listing, region, job)
    if found:
        logging.info("%s has this specification already and is used. To train again, set another RUN.", found.name)
        return found
    return submit(region, job)


def submit(region: Region, job: Any) -> Any:
    """Submits a CustomJob or a HyperparameterTuningJob; returns it with its name."""
    if isinstance(job, v1.HyperparameterTuningJob):
        return region.jobs.create_hyperparameter_tuning_job(parent=region.parent, hyperparameter_tuning_job=job)
    return region.jobs.create_custom_job(parent=region.parent, custom_job=job)


def wait_for_job(region: Region, job: Any, *, poll_secs: float) -> Any:
    """The job after it has ended. Raises UserError, with the message of Vertex AI, if it has not succeeded."""
    is_tuning = isinstance(job, v1.HyperparameterTuningJob)
    get = region.jobs.get_hyperparameter_tuning_job if is_tuning else region.jobs.get_custom_job
    return _wait(lambda: get(name=job.name, retry=_RETRY), poll_secs)


def job_dir_of(job: Any) -> str:
    """The job_dir that a finished job has written; of a tuning job, that of its best trial.

    Raises UserError if no trial has succeeded.
    """
    if not isinstance(job, v1.HyperparameterTuningJob):
        return job.job_spec.base_output_directory.output_uri_prefix.rstrip("/")
    (metric,) = job.study_spec.metrics
    sign = 1 if metric.goal == v1.StudySpec.MetricSpec.GoalType.MAXIMIZE else -1
    trials = [
        trial for trial in job.trials if trial.state == v1.Trial.State.SUCCEEDED and trial.final_measurement.metrics
    ]
    if not trials:
        raise UserError(f"No trial of {job.name} has succeeded: read their logs, then set another RUN.")
    best = max(trials, key=lambda trial: sign * trial.final_measurement.metrics[0].value)
    logging.info("The best trial is %s: %s.", best.id, best.final_measurement.metrics[0].value)
    return f"{job.trial_job_spec.base_output_directory.output_uri_prefix.rstrip('/')}/{best.id}"


def upload(region: Region, *, job_name: str, job_dir: str, image: str, run: str) -> Any:
    """The Model of a finished job, with what its model card says; uploads it unless that has been done.

    `image` is that of the job, in which trainer.serve answers. The ID of the model contains that of the job. Raises
    UserError if the job_dir holds no finished run.
    """
    job_id = job_name.rpartition("/")[2]
    model_id = f"picture-trainer-{job_id}"
    name = f"{region.parent}/models/{model_id}"
    record = run_record.read(job_dir)
    if not record.metrics:
        raise UserError(f"{job_dir} has no metrics.json, which a finished job writes: read the log of {job_name}.")
    model = v1.Model(
        display_name=run,
        description=_description(record, job_dir),
        labels=_labels(record, run=run, job_id=job_id),
        artifact_uri=f"{job_dir}/model",
        container_spec=v1.ModelContainerSpec(
            image_uri=image,
            command=["python3", "-m", "trainer.serve"],
            ports=[v1.Port(container_port=SERVER_PORT)],
            predict_route="/predict",
            health_route="/health",
        ),
    )
    return _find_or_create(
        lambda: region.models.get_model(name=name, retry=_RETRY),
        lambda: region.models.upload_model(v1.UploadModelRequest(parent=region.parent, model_id=model_id, model=model)),
        f"model {model_id}",
    )


def deploy(region: Region, model: Any, *, endpoint_id: str, machine_type: str, max_replicas: int) -> tuple[Any, str]:
    """Deploys the model to the endpoint, which is created if it does not exist, and sends all requests to it.

    Returns the endpoint and the ID of the deployed model. Models that were deployed before stay deployed without requests.
    """
    name = f"{region.parent}/endpoints/{endpoint_id}"
    # A dedicated endpoint takes requests of 10 MB, a shared one of 1.5 MB, less than a photo of a phone.
    endpoint = v1.Endpoint(display_name=endpoint_id, dedicated_endpoint_enabled=True)
    _find_or_create(
        lambda: region.endpoints.get_endpoint(name=name, retry=_RETRY),
        lambda: region.endpoints.create_endpoint(parent=region.parent, endpoint=endpoint, endpoint_id=endpoint_id),
        f"endpoint {endpoint_id}",
    )
    deployed_id = str(zlib.crc32(model.name.rpartition("/")[2].encode()))  # at most ten digits
    deployed = v1.DeployedModel(
        id=deployed_id,
        model=model.name,
        display_name=model.display_name,
        dedicated_resources=v1.DedicatedResources(
            machine_spec=v1.MachineSpec(machine_type=machine_type), min_replica_count=1, max_replica_count=max_replicas
        ),
    )

    def get() -> Any:
        found = region.endpoints.get_endpoint(name=name, retry=_RETRY)
        if all(one.id != deployed_id for one in found.deployed_models):
            raise exceptions.NotFound(f"model {deployed_id}")
        return found

    found = _find_or_create(
        get,
        # "0" is the model of this request.
        lambda: region.endpoints.deploy_model(endpoint=name, deployed_model=deployed, traffic_split={"0": 100}),
        f"deployment of {model.display_name} to {endpoint_id} (10 to 20 minutes)",
    )
    return found, deployed_id


def predict_batch(
    region: Region, model: Any, *, source: str, output: str, machine_type: str, max_replicas: int, poll_secs: float
) -> str:
    """Classifies the images of `source` and returns the folder with the predictions, one below `output`.

    `source` is a gs:// path: .jsonl has one instance for trainer.serve per line, any other file the gs:// path of one image.
    """
    job = v1.BatchPredictionJob(
        display_name=model.display_name,
        model=model.name,
        input_config=v1.BatchPredictionJob.InputConfig(
            instances_format="jsonl" if source.endswith(".jsonl") else "file-list",
            gcs_source=v1.GcsSource(uris=[source]),
        ),
        output_config=v1.BatchPredictionJob.OutputConfig(
            predictions_format="jsonl", gcs_destination=v1.GcsDestination(output_uri_prefix=output)
        ),
        dedicated_resources=v1.BatchDedicatedResources(
            machine_spec=v1.MachineSpec(machine_type=machine_type),
            starting_replica_count=max_replicas,
            max_replica_count=max_replicas,
        ),
    )
    add_specification_label(job)
    found = _newest(region.jobs.list_batch_prediction_jobs, region, job)
    if not found:
        found = region.jobs.create_batch_prediction_job(parent=region.parent, batch_prediction_job=job)
    logging.info("Batch prediction: %s", found.name)
    done = _wait(lambda: region.jobs.get_batch_prediction_job(name=found.name, retry=_RETRY), poll_secs)
    if done.partial_failures:
        logging.warning(
            "%d partial failures; the first: %s", len(done.partial_failures), done.partial_failures[0].message
        )
    return done.output_info.gcs_output_directory


def _newest(listing: Callable, region: Region, resource: Any) -> Any:
    """The newest resource with the specification label of `resource` that runs or has succeeded, None without one."""
    condition = f'labels.{SPECIFICATION_LABEL}="{resource.labels[SPECIFICATION_LABEL]}"'
    found: Iterable[Any] = listing({"parent": region.parent, "filter": condition}, retry=_RETRY)
    usable = [one for one in found if one.state not in _NOT_REUSED]
    return max(usable, key=lambda one: one.create_time.timestamp() if one.create_time else 0.0, default=None)


def _wait(get: Callable[[], Any], poll_secs: float) -> Any:
    state = None
    while True:
        resource = get()
        if resource.state != state:
            state = resource.state
            logging.info("%s: %s", resource.name, v1.JobState(state).name.removeprefix("JOB_STATE_").lower())
        if state not in _ENDED:
            time.sleep(poll_secs)
        elif state in _NOT_REUSED:
            reason = resource.error.message or "Vertex AI gives no reason"
            raise UserError(
                f"{resource.name} ended as {v1.JobState(state).name}: {reason}. Read its log, then start again."
            )
        else:
            return resource


def _find_or_create(get: Callable[[], Any], create: Callable[[], Any], title: str) -> Any:
    """What `get` returns; if it raises NotFound, after the operation that `create` starts."""
    try:
        found = get()
        logging.info("Found: %s.", title)
        return found
    except exceptions.NotFound:
        logging.info("Creating: %s.", title)
    try:
        create().result(timeout=OPERATION_SECS)
    except exceptions.Conflict:  # the operation of an earlier call, which was stopped, still runs
        logging.info("An earlier call has started this already.")
    return _UNTIL_FOUND(get)()


def _description(record: RunRecord, job_dir: str) -> str:
    paths = JobDir(job_dir)
    return (
        f"{record.backbone}, {len(record.class_names)} classes. {_accuracy(record)}. "
        f"Model card: {paths.model_card}. Report: {paths.report_page}."
    )


def _accuracy(record: RunRecord) -> str:
    values = record.test or (record.estimates[0] if record.estimates else {})
    if not values:
        return "No accuracy"
    kind = "test" if record.test else values["kind"].replace("_", "-")
    return (
        f"{kind} accuracy {values['accuracy']:.4f} ({values['low']:.3f} to {values['high']:.3f}) of {values['images']} images"
    ).capitalize()


def _labels(record: RunRecord, *, run: str, job_id: str) -> dict[str, str]:
    values = {
        "run": run,
        "training-job": job_id,
        "backbone": record.backbone,
        "classes": str(len(record.class_names)),
        "val-accuracy": f"{record.metrics['val_accuracy']:.4f}",
    }
    # Lower-case letters, digits, _ and -, at most 63: https://cloud.google.com/vertex-ai/docs/general/labels
    return {name: re.sub(r"[^a-z0-9_-]", "-", value.lower())[:63] for name, value in values.items()}
