"""Submits a job to Vertex AI: one of deploy/vertex/*.yaml, with the names of deploy/vertex/settings.env in it.

    pip install '.[deploy]'
    python deploy/submit.py vertex --config=deploy/vertex/one-gpu.yaml --dry_run
        shows what would be submitted, checked field by field against Vertex AI's own definition
    python deploy/submit.py vertex --config=deploy/vertex/one-gpu.yaml
        submits it and prints the job's name and its address in the console

A variable of the environment wins over settings.env: `RUN=second python deploy/submit.py ...`.
"""

import os
import re
import string
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from absl import flags, logging

from trainer import command
from trainer.errors import UserError

SETTINGS = os.path.join(os.path.dirname(__file__), "vertex", "settings.env")
ALWAYS_NEEDED = ("PROJECT", "REGION", "RUN")


def define_flags() -> None:
    """What to submit, and whether to."""
    flags.DEFINE_string("config", "", "The job's specification, as in deploy/vertex.")
    flags.DEFINE_string("settings", SETTINGS, "File of NAME=value lines that the specification's ${NAME} stand for.")
    flags.DEFINE_boolean("dry_run", False, "Check everything and show the result, but submit nothing.")
    flags.DEFINE_string(
        "api_endpoint",
        "",
        "Where Vertex AI answers. Default: Google's, of the region. Over http:// without credentials.",
    )


def main(arguments: list[str]) -> int:
    """Checks and submits the job that the flags name; returns the exit code."""
    if arguments != ["vertex"]:
        raise UserError(f"{' '.join(arguments) or 'no platform'} was given: write `vertex`; it is the only one so far.")
    if not flags.FLAGS.config:
        raise UserError("--config is not set: pass a specification, such as deploy/vertex/one-gpu.yaml.")
    names = read_settings(_read(flags.FLAGS.settings, "--settings"), os.environ)
    for name in ALWAYS_NEEDED:
        if not names.get(name):
            raise UserError(f"{name} has no value: write {name}=... into {flags.FLAGS.settings}, or export it.")
    job = parse(_read(flags.FLAGS.config, "--config"), names, flags.FLAGS.config)
    _check_arguments(job)
    if flags.FLAGS.dry_run:
        print(_as_yaml(job), end="")
        return 0
    name = submit(job, project=names["PROJECT"], region=names["REGION"], endpoint=flags.FLAGS.api_endpoint)
    job_id = name.rpartition("/")[2]
    print(name)
    print(
        f"https://console.cloud.google.com/vertex-ai/locations/{names['REGION']}/training/{job_id}"
        f"?project={names['PROJECT']}"
    )
    return 0


def read_settings(text: str, environment: Mapping[str, str]) -> dict[str, str]:
    """The NAME=value lines of a file, each overridden by a variable of the environment. Raises UserError."""
    names = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        match = re.fullmatch(r"([A-Z][A-Z0-9_]*)=([^\s'\"$`\\]*)", line.strip())
        if not match:
            raise UserError(
                f"Line {number} of the settings is {line!r}: write NAME=value without quotes, blanks or $, for a shell "
                "reads the file too."
            )
        names[match[1]] = environment.get(match[1]) or match[2]
    return names


def parse(text: str, names: dict[str, str], source: str) -> Any:
    """The CustomJob or HyperparameterTuningJob that a specification describes.

    Raises UserError for a ${NAME} without a value, for YAML that is none and for fields that Vertex AI does not know.
    """
    v1, yaml, json_format = _client()
    try:
        fields = yaml.safe_load(string.Template(text).substitute(names))
    except KeyError as error:
        raise UserError(
            f"{source} has ${{{error.args[0]}}}, which has no value: write NAME=value into the file of --settings."
        ) from None
    except ValueError as error:
        raise UserError(f"{source} has a lone $ ({error}): write ${{NAME}}, or $$ for the sign itself.") from None
    except yaml.YAMLError as error:
        raise UserError(f"{source} is no YAML: {error}.") from None
    if not isinstance(fields, dict):
        raise UserError(f"{source} holds {type(fields).__name__}: write the fields of a CustomJobSpec.")
    kind = v1.HyperparameterTuningJob if "studySpec" in fields else v1.CustomJob
    fields = fields if "studySpec" in fields else {"jobSpec": fields}
    message = kind.pb()()
    try:
        json_format.ParseDict({"displayName": names["RUN"], **fields}, message, ignore_unknown_fields=False)
    except json_format.ParseError as error:
        raise UserError(f"{source} is not what Vertex AI takes: {error}.") from None
    return kind.wrap(message)


def custom_job_spec(job: Any) -> Any:
    """What one machine of the job does: the CustomJobSpec of a CustomJob, or that of a HyperparameterTuningJob's trials."""
    return job.job_spec if hasattr(job, "job_spec") else job.trial_job_spec


def submit(job: Any, *, project: str, region: str, endpoint: str) -> str:
    """Submits the job; returns its resource name. Raises UserError if Vertex AI refuses it."""
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
    except exceptions.ClientError as error:  # 4xx: to ask again would not help
        raise UserError(f"Vertex AI refuses the job: {error.message}") from None


def _check_arguments(job: Any) -> None:
    """Raises UserError if the trainer does not know an argument: better now than minutes later on a paid machine."""
    spec = custom_job_spec(job)
    for number, pool in enumerate(spec.worker_pool_specs):
        trainer = subprocess.run(
            [sys.executable, "-m", "trainer.task", *pool.container_spec.args, "--help"], capture_output=True, text=True
        )
        if trainer.returncode == command.EXIT_USER_ERROR:
            reason = trainer.stderr.splitlines()[0].removeprefix("error: ")
            raise UserError(f"The trainer refuses the args of worker pool {number}: {reason}")
        trainer.check_returncode()
    logging.info("%d worker pools; the trainer knows all their arguments.", len(spec.worker_pool_specs))


def _as_yaml(job: Any) -> str:
    _, yaml, json_format = _client()
    return yaml.safe_dump(json_format.MessageToDict(type(job).pb(job)), sort_keys=False)


def _read(path: str, flag: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError as error:
        raise UserError(f"{flag}={path} cannot be read ({error.strerror}): pass a file.") from None


def _client() -> Any:
    """Vertex AI's client, PyYAML and protobuf's JSON; a UserError where they are not installed."""
    try:
        import yaml
        from google.cloud import aiplatform_v1
        from google.protobuf import json_format
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install '.[deploy]'.") from None
    return aiplatform_v1, yaml, json_format


if __name__ == "__main__":
    command.run(main, define_flags=define_flags)
