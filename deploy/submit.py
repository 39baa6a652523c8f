"""Submits a job to Vertex AI: a specification of deploy/vertex, with the values of deploy/vertex/settings.env.

    pip install '.[deploy]'
    python deploy/submit.py vertex --config=deploy/vertex/one-gpu.yaml --dry_run
        prints what would be submitted, after checking each field against the API definition of Vertex AI
    python deploy/submit.py vertex --config=deploy/vertex/one-gpu.yaml
        submits it and prints the job's resource name and its URL in the console

An environment variable overrides settings.env: `RUN=second python deploy/submit.py ...`.
"""

import os
import re
import string
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from absl import flags, logging

from trainer import cli
from trainer.errors import UserError

SETTINGS_PATH = os.path.join(os.path.dirname(__file__), "vertex", "settings.env")
REQUIRED_SETTINGS = ("PROJECT", "REGION", "RUN")


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("config", "", "Specification of the job, such as deploy/vertex/one-gpu.yaml.")
    flags.DEFINE_string("settings", SETTINGS_PATH, "File of NAME=value lines for each ${NAME} in the specification.")
    flags.DEFINE_boolean("dry_run", False, "Check everything and print the result, but submit nothing.")
    flags.DEFINE_string(
        "api_endpoint",
        "",
        "Address of the Vertex AI API. Default: Google's endpoint of the region. http:// sends no credentials.",
    )


def main(arguments: list[str]) -> int:
    """Checks and submits the job that the flags describe; returns the exit code."""
    if arguments != ["vertex"]:
        raise UserError(f"The arguments are {' '.join(arguments)!r}: pass `vertex`, the only supported platform.")
    if not flags.FLAGS.config:
        raise UserError("--config is not set: pass a specification, such as deploy/vertex/one-gpu.yaml.")
    settings = read_settings(_read(flags.FLAGS.settings, "--settings"), os.environ)
    for name in REQUIRED_SETTINGS:
        if not settings.get(name):
            raise UserError(f"{name} has no value: add {name}=... to {flags.FLAGS.settings}, or export it.")
    job = parse(_read(flags.FLAGS.config, "--config"), settings, flags.FLAGS.config)
    _check_arguments(job)
    if flags.FLAGS.dry_run:
        print(_as_yaml(job), end="")
        return 0
    project, region = settings["PROJECT"], settings["REGION"]
    name = submit(job, project=project, region=region, endpoint=flags.FLAGS.api_endpoint)
    job_id = name.rpartition("/")[2]
    print(name)
    print(f"https://console.cloud.google.com/vertex-ai/locations/{region}/training/{job_id}?project={project}")
    return 0


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


def submit(job: Any, *, project: str, region: str, endpoint: str) -> str:
    """Submits the job and returns its resource name. Raises UserError if Vertex AI rejects it (HTTP 4xx)."""
    v1, _, _ = _client()
    from google.api_core import exceptions
    from google.auth import exceptions as auth_exceptions
    from google.auth.credentials import AnonymousCredentials
    from google.cloud.aiplatform_v1.services.job_service.transports import JobServiceRestTransport

    scheme, _, host = endpoint.rpartition("://")
    try:
        transport = JobServiceRestTransport(
            host=host or f"{region}-aiplatform.googleapis.com",
            url_scheme=scheme or "https",
            credentials=AnonymousCredentials() if scheme == "http" else None,
        )
        client = v1.JobServiceClient(transport=transport)
        parent = f"projects/{project}/locations/{region}"
        if isinstance(job, v1.HyperparameterTuningJob):
            return client.create_hyperparameter_tuning_job(parent=parent, hyperparameter_tuning_job=job).name
        return client.create_custom_job(parent=parent, custom_job=job).name
    except auth_exceptions.DefaultCredentialsError:
        raise UserError("There are no credentials: run `gcloud auth application-default login`.") from None
    except exceptions.ClientError as error:  # 4xx: a retry fails in the same way
        raise UserError(f"Vertex AI rejects the job: {error.message}") from None


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
