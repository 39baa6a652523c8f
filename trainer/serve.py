r"""Serves a trained model over HTTP: a page to drop images on, and JSON in the format of Vertex AI and TensorFlow Serving.

    python -m trainer.serve --model_dir=J/saved_model
        then open http://127.0.0.1:8080 and drop images on it
    curl http://127.0.0.1:8080/predict --data "{\"instances\": [{\"bytes\": {\"b64\": \"$(base64 -w0 photo.jpg)\"}}]}"

    curl http://127.0.0.1:8080/predict --form image=@photo.jpg
    curl http://127.0.0.1:8080/predict --header "Content-Type: image/jpeg" --data-binary @photo.jpg

POST /predict takes {"instances": [{"bytes": {"b64": "..."}}, ...]} and returns {"predictions": [...]}, each with label,
probability and probabilities, or with error, the reason why that image has no prediction; other images are not affected.
It also takes one image file, or a form with image files; each may be compressed with gzip. So does the path of
TensorFlow Serving, /v1/models/NAME:predict. {"instances": [...], "parameters": {"explain": true}}, or ?explain=true, adds
heatmap: rows of 0 to 1, high where the image supports the label.
GET /health returns 503 until the model is loaded, then 200 with the class names, which model it is and, beside the files of its
run, the accuracy. GET /metrics is for Prometheus.

A Host that is a public domain, or an Origin other than this server, is refused unless a flag allows it: otherwise each
web page that you open could use the server. In a Vertex AI prediction container every Host is allowed, and the server
listens on all addresses at AIP_HTTP_PORT, with the routes AIP_HEALTH_ROUTE and AIP_PREDICT_ROUTE and the model of
AIP_STORAGE_URI. After SIGTERM it completes the requests in progress and ends.
"""

import os
from collections.abc import Mapping

from absl import flags, logging

from trainer import cli
from trainer.errors import UserError
from trainer.formatting import LANGUAGES
from trainer.runtime import memory
from trainer.serving import classifier
from trainer.serving.classifier import Classifier
from trainer.storage import files

MEMORY_FOR_MANY_CALLS = 4 * 2**30  # bytes: twice what the conversion of ResNet50 takes


def define_flags() -> None:
    """Defines the flags of this command."""
    flags.DEFINE_string("model_dir", "", "A saved_model folder, or the job_dir of a run. Default: AIP_STORAGE_URI.")
    flags.DEFINE_string(
        "host", "127.0.0.1", "Address to listen on; 0.0.0.0 for all, the default if AIP_HTTP_PORT is set."
    )
    flags.DEFINE_integer(
        "port", 8080, "Port to listen on. Default: AIP_HTTP_PORT, else 8080.", lower_bound=0, upper_bound=65535
    )
    flags.DEFINE_integer(
        "max_request_mb", 32, "Largest request, in MiB; base64 makes an image a third larger.", lower_bound=1
    )
    flags.DEFINE_integer("max_requests", 16, "Concurrent requests; further ones are answered with 503.", lower_bound=1)
    flags.DEFINE_integer(
        "max_megapixels", 50, "Largest image; a transparent PNG takes 25 bytes per pixel.", lower_bound=1
    )
    flags.DEFINE_float(
        "timeout_secs", 60, "A request that takes longer to arrive (408), or to answer (503), fails.", lower_bound=0.1
    )
    flags.DEFINE_float("decode_timeout_secs", 10, "An image that takes longer to decode is an error.", lower_bound=0.1)
    flags.DEFINE_integer("decoders", 2, "Processes that decode images, one at a time each.", lower_bound=1)
    flags.DEFINE_list(
        "allowed_hosts",
        [],
        "Public domains by which clients reach the server, or * for all. Addresses and local names are always allowed. "
        "Default: * if AIP_HTTP_PORT is set.",
    )
    flags.DEFINE_list(
        "allowed_origins", [], "Origins, as https://example.com, whose web pages may use the server, or * for all."
    )
    flags.DEFINE_enum("language", "en", LANGUAGES, "Language of the page.")


def with_environment(values: dict, given: set[str], environment: Mapping[str, str]) -> dict:
    """Adds the routes, and sets flags that are not `given` to what Vertex AI sets in a prediction container."""
    values = {**values, "predict_route": "/predict", "health_route": "/health"}
    if "model_dir" not in given:
        values["model_dir"] = environment.get("AIP_STORAGE_URI", "").rstrip("/")
    if "port" not in given and "AIP_HTTP_PORT" in environment:
        values["port"] = int(environment["AIP_HTTP_PORT"])
    if "host" not in given and "AIP_HTTP_PORT" in environment:
        values["host"] = "0.0.0.0"
    if "allowed_hosts" not in given and "AIP_HTTP_PORT" in environment:
        values["allowed_hosts"] = ["*"]  # the name of the endpoint is not known here, and it requires a token
    for name in ("predict_route", "health_route"):
        values[name] = environment.get(f"AIP_{name.upper()}", values[name])
    return values


def main(arguments: list[str]) -> int:
    """Serves until a signal arrives."""
    if arguments:
        raise UserError(f"{arguments[0]!r} is not a flag: write --model_dir={arguments[0]} if it is the model.")
    names = [
        "model_dir",
        "host",
        "port",
        "max_request_mb",
        "max_requests",
        "max_megapixels",
        "timeout_secs",
        "decode_timeout_secs",
        "decoders",
        "allowed_hosts",
        "allowed_origins",
        "language",
    ]
    given = {name for name in names if flags.FLAGS[name].present}
    values = with_environment(cli.flag_values(names), given, os.environ)
    model_dir = values["model_dir"]
    if not model_dir:
        cli.require("model_dir")
    if not files.is_remote(model_dir):
        classifier.check_model_dir(model_dir)  # before TensorFlow's import, which takes seconds

    from trainer.serving import server
    from trainer.serving.app import Access, Limits

    def load() -> Classifier:
        cli.import_tensorflow()
        has_memory = memory.free_bytes() >= MEMORY_FOR_MANY_CALLS
        if not has_memory:
            logging.info(
                "Less than 4 GiB of memory are free: a SavedModel takes about 1.4 times as long for one image."
            )
        return classifier.load(model_dir, for_many_calls=has_memory)

    listening = server.listen(values["host"], values["port"])
    host, port = listening.getsockname()[:2]
    logging.info("Loading %s; then the page is at http://%s:%d (Ctrl+C to stop).", model_dir, host, port)
    server.run(
        listening,
        load,
        Limits(
            max_request_bytes=values["max_request_mb"] * 2**20,
            max_concurrent_requests=values["max_requests"],
            max_image_pixels=values["max_megapixels"] * 10**6,
            timeout_secs=values["timeout_secs"],
            decode_timeout_secs=values["decode_timeout_secs"],
            num_decoders=values["decoders"],
        ),
        Access(
            predict_route=values["predict_route"],
            health_route=values["health_route"],
            allowed_hosts=tuple(values["allowed_hosts"]),
            allowed_origins=tuple(values["allowed_origins"]),
            language=values["language"],
        ),
    )
    logging.info("Stopped.")
    return 0


if __name__ == "__main__":
    cli.run(main, define_flags=define_flags)
