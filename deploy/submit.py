"""Submits a job to Vertex AI: a specification of deploy/vertex, with the values of deploy/vertex/settings.env.

    pip install '.[deploy]'
    python deploy/submit.py vertex --config=deploy/vertex/one-gpu.yaml --dry_run
        prints what would be submitted, after checking each field against the API definition of Vertex AI
    python deploy/submit.py vertex --config=deploy/vertex/one-gpu.yaml
        submits it and prints the job's resource name and its URL in the console
    python deploy/submit.py vertex --config=deploy/vertex/one-gpu.yaml --then=upload,deploy
        waits for the job, uploads its model, deploys it to an endpoint and prints how to use and how to remove it
    python deploy/submit.py vertex --config=deploy/vertex/one-gpu.yaml --then=batch --batch_source=gs://BUCKET/list.txt
        waits for the job, uploads its model and classifies the images in the list

With --then, the same command resumes where an earlier one was stopped: it finds the job, the model and the endpoint.
An environment variable overrides settings.env: `RUN=second python deploy/submit.py ...`.
"""

import os
import re
import string
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

from absl import flags, logging

from trainer import cli
from trainer.errors import UserError

SETTINGS_PATH = os.path.join(os.path.dirname(__file__), "vertex", "settings.env")
REQUIRED_SETTINGS = ("PROJECT", "REGION", "RUN")
STEPS = ("upload", "deploy", "batch")  # of --then
EXIT_INTERRUPTED = 130  # 128 + SIGINT


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("config", "", "Specification of the job, such as deploy/vertex/one-gpu.yaml.")
    flags.DEFINE_string("settings", SETTINGS_PATH, "File of NAME=value lines for each ${NAME} in the specification.")
    flags.DEFINE_boolean("dry_run", False, "Check everything and print the result, but submit nothing.")
    flags.DEFINE_list(
        "then",
        "",
        "Comma-separated steps after the job: upload (to the model registry), deploy (to an endpoint), batch (prediction). "
        "The last two upload too.",
    )
    flags.DEFINE_string(
        "endpoint", "pictures", "ID of the endpoint for --then=deploy: lower-case letters, digits and -."
    )
    flags.DEFINE_string("machine_type", "n1-standard-4", "Machine that serves the model, for --then=deploy and batch.")
    flags.DEFINE_integer("max_replicas", 1, "Most machines that serve the model; a batch uses all.", lower_bound=1)
    flags.DEFINE_string(
        "batch_source",
        "",
        "gs:// path for --then=batch: a text file with the gs:// path of an image per line, or a .jsonl of instances.",
    )
    flags.DEFINE_float("poll_secs", 30.0, "Seconds between two questions for the state of a job.", lower_bound=0.01)
    flags.DEFINE_string(
        "api_endpoint",
        "",
        "Address of the Vertex AI API. Default: Google's endpoint of the region. http:// sends no credentials.",
    )


def main(arguments: list[str]) -> int:
    """Checks and submits the job that the flags describe, and does the steps of --then; returns the exit code."""
    if arguments != ["vertex"]:
        raise UserError(f"The arguments are {' '.join(arguments)!r}: pass `vertex`, the only supported platform.")
    if not flags.FLAGS.config:
        raise UserError("--config is not set: pass a specification, such as deploy/vertex/one-gpu.yaml.")
    _check_steps()
    settings = read_settings(_read(flags.FLAGS.settings, "--settings"), os.environ)
    for name in REQUIRED_SETTINGS:
        if not settings.get(name):
            raise UserError(f"{name} has no value: add {name}=... to {flags.FLAGS.settings}, or export it.")
    job = parse(_read(flags.FLAGS.config, "--config"), settings, flags.FLAGS.config)
    _check_arguments(job)
    if flags.FLAGS.dry_run:
        print(_as_yaml(job), end="")
        return 0
    return _answer_errors(lambda: _run(job, settings))


def _check_steps() -> None:
    """Raises UserError for steps of --then that are unknown or lack a flag, before a machine is paid for."""
    unknown = sorted(set(flags.FLAGS.then) - set(STEPS))
    if unknown:
        raise UserError(f"--then has {', '.join(unknown)}: pass one or more of {', '.join(STEPS)}.")
    if ("batch" in flags.FLAGS.then) != bool(flags.FLAGS.batch_source):
        raise UserError("--then=batch and --batch_source=gs://... require each other: pass both.")
    if flags.FLAGS.batch_source and not flags.FLAGS.batch_source.startswith("gs://"):
        raise UserError(f"--batch_source is {flags.FLAGS.batch_source}: pass a file in a bucket, gs://BUCKET/list.txt.")
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", flags.FLAGS.endpoint):
        raise UserError(
            f"--endpoint is {flags.FLAGS.endpoint!r}: pass at most 63 lower-case letters, digits and -, from a letter on."
        )


def _answer_errors(action: Callable[[], None]) -> int:
    """The exit code of `action`; raises UserError for what Vertex AI rejects (HTTP 4xx)."""
    from google.api_core import exceptions
    from google.auth import exceptions as auth_exceptions

    try:
        action()
        return 0
    except auth_exceptions.DefaultCredentialsError:
        raise UserError("There are no credentials: run `gcloud auth application-default login`.") from None
    except exceptions.ClientError as error:  # 4xx: a retry fails in the same way
        raise UserError(f"Vertex AI rejects the request: {error.message}") from None
    except exceptions.GoogleAPIError as error:
        cli.print_error(UserError(f"Vertex AI does not answer ({error}): start the same command again; it resumes."))
        return cli.EXIT_RETRY
    except KeyboardInterrupt:
        cli.print_error(UserError("Stopped. What was started continues: start the same command again to wait for it."))
        return EXIT_INTERRUPTED


def _run(job: Any, settings: dict[str, str]) -> None:
    """Submits the job and does the steps of --then."""
    import vertex_ai  # in the folder of this file; it requires the packages of the extra `deploy`

    region = vertex_ai.Region(settings["PROJECT"], settings["REGION"], flags.FLAGS.api_endpoint)
    vertex_ai.add_specification_label(job)
    steps = flags.FLAGS.then
    submitted = vertex_ai.find_or_submit(region, job) if steps else vertex_ai.submit(region, job)
    job_id = submitted.name.rpartition("/")[2]
    print(submitted.name)
    print(
        f"https://console.cloud.google.com/vertex-ai/locations/{region.name}/training/{job_id}?project={region.project}",
        flush=True,
    )
    if not steps:
        return
    done = vertex_ai.wait_for_job(region, submitted, poll_secs=flags.FLAGS.poll_secs)
    job_dir = vertex_ai.job_dir_of(done)
    image = custom_job_spec(job).worker_pool_specs[0].container_spec.image_uri
    model = vertex_ai.upload(region, job_name=done.name, job_dir=job_dir, image=image, run=settings["RUN"])
    print(f"Model: {model.name}\n  {model.description}", flush=True)
    machines = {"machine_type": flags.FLAGS.machine_type, "max_replicas": flags.FLAGS.max_replicas}
    if "deploy" in steps:
        print(
            _use_of(*vertex_ai.deploy(region, model, endpoint_id=flags.FLAGS.endpoint, **machines), region), flush=True
        )
    if "batch" in steps:
        output = vertex_ai.predict_batch(
            region,
            model,
            source=flags.FLAGS.batch_source,
            output=f"{job_dir}/batch",
            poll_secs=flags.FLAGS.poll_secs,
            **machines,
        )
        print(f"Predictions: {output}\n  gcloud storage cat '{output}/prediction.results-*'")


def _use_of(endpoint: Any, deployed_id: str, region: Any) -> str:
    """The lines that say how to send an image to the endpoint, and how to stop paying for it."""
    host = f"https://{endpoint.dedicated_endpoint_dns or f'{region.name}-aiplatform.googleapis.com'}"
    options = f"--region={region.name} --project={region.project}"
    endpoint_id = endpoint.name.rpartition("/")[2]
    lines = [
        f"Endpoint: {endpoint.name}",
        "To classify an image:",
        """  echo "{\\"instances\\": [{\\"bytes\\": {\\"b64\\": \\"$(base64 -w0 photo.jpg)\\"}}]}" > request.json""",
        '  curl --header "Authorization: Bearer $(gcloud auth print-access-token)" --header "Content-Type: application/json" '
        f"--data @request.json {host}/v1/{endpoint.name}:predict",
        f"Each deployed model costs at least one {flags.FLAGS.machine_type} until it is removed:",
    ]
    for model in sorted(endpoint.deployed_models, key=lambda one: one.id != deployed_id):
        command = f"gcloud ai endpoints undeploy-model {endpoint_id} {options} --deployed-model-id={model.id}"
        lines.append(
            f"  {command}" + ("" if model.id == deployed_id else f"  # {model.display_name}: gets no requests")
        )
    lines.append(f"  gcloud ai endpoints delete {endpoint_id} {options}")
    return "\n".join(lines)


def read_settings(text: str, environment: Mapping[str, str]) -> dict[str, str]:
    """Values by name of the NAME=value lines in `text`; a variable of `environment` overrides each.

    Raises UserError for a line that a shell would read differently, since `envsubst` users source the same file.
    """
    settings = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        match = re.fullmatch(r"([A-Z][A-Z0-9_]*)=([^\s'\"$`\\]*)", line.strip())
        if not match:
            raise UserError(
                f"Line {number} of the settings is {line!r}: write NAME=value without quotes, spaces or $, because a "
                "shell reads the file too."
            )
        settings[match[1]] = environment.get(match[1]) or match[2]
    return settings


def parse(text: str, settings: dict[str, str], source: str) -> Any:
    """The CustomJob or HyperparameterTuningJob that the specification `text` describes.

    Raises UserError, with `source` as the name of the file, for a ${NAME} without a value, for invalid YAML, and for
    fields that Vertex AI does not define.
    """
    v1, yaml, json_format = _client()
    try:
        fields = yaml.safe_load(string.Template(text).substitute(settings))
    except KeyError as error:
        raise UserError(
            f"{source} has ${{{error.args[0]}}}, which has no value: add NAME=value to the file of --settings."
        ) from None
    except ValueError as error:
        raise UserError(f"{source} has a lone $ ({error}): write ${{NAME}}, or $$ for a literal $.") from None
    except yaml.YAMLError as error:
        raise UserError(f"{source} is not valid YAML: {error}.") from None
    if not isinstance(fields, dict):
        raise UserError(f"{source} contains {type(fields).__name__}: write the fields of a CustomJobSpec.")
    kind = v1.HyperparameterTuningJob if "studySpec" in fields else v1.CustomJob
    fields = fields if "studySpec" in fields else {"jobSpec": fields}
    message = kind.pb()()
    try:
        json_format.ParseDict({"displayName": settings["RUN"], **fields}, message, ignore_unknown_fields=False)
    except json_format.ParseError as error:
        raise UserError(f"{source} is not a job that Vertex AI accepts: {error}.") from None
    return kind.wrap(message)


def custom_job_spec(job: Any) -> Any:
    """The CustomJobSpec of a CustomJob, or that of the trials of a HyperparameterTuningJob."""
    return job.job_spec if hasattr(job, "job_spec") else job.trial_job_spec


def _check_arguments(job: Any) -> None:
    """Raises UserError if the trainer rejects an argument, before a machine is paid for."""
    spec = custom_job_spec(job)
    for number, pool in enumerate(spec.worker_pool_specs):
        trainer = subprocess.run(
            [sys.executable, "-m", "trainer.task", *pool.container_spec.args, "--help"], capture_output=True, text=True
        )
        if trainer.returncode == cli.EXIT_USER_ERROR:
            reason = trainer.stderr.splitlines()[0].removeprefix("error: ")
            raise UserError(f"The trainer rejects the args of worker pool {number}: {reason}")
        trainer.check_returncode()
    logging.info("%d worker pools; the trainer accepts all their arguments.", len(spec.worker_pool_specs))


def _as_yaml(job: Any) -> str:
    _, yaml, json_format = _client()
    return yaml.safe_dump(json_format.MessageToDict(type(job).pb(job)), sort_keys=False)


def _read(path: str, flag: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError as error:
        raise UserError(f"{flag}={path} cannot be read ({error.strerror}): pass the path of a file.") from None


def _client() -> Any:
    """The Vertex AI client, PyYAML and protobuf's JSON module. Raises UserError if one is not installed."""
    try:
        import yaml
        from google.cloud import aiplatform_v1
        from google.protobuf import json_format
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install '.[deploy]'.") from None
    return aiplatform_v1, yaml, json_format


if __name__ == "__main__":
    cli.run(main, define_flags=define_flags)
