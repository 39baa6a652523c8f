"""How every command starts and ends: flags, help, one-line errors, exit codes.

0 done; 2 the user must change something; 143 stopped by a signal after saving; anything else: retry may help.
Nothing here imports TensorFlow, so that `--help` and wrong flags answer at once.
"""

import datetime
import json
import logging as python_logging
import os
import shutil
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Callable, Iterable
from typing import Any

from absl import flags, logging

from trainer.errors import UserError

EXIT_USER_ERROR = 2


EXIT_RETRY = 75  # EX_TEMPFAIL of sysexits.h


EXIT_STOPPED = 143  # 128 + SIGTERM: what Kubernetes and Vertex AI see of a process that the signal ended


def run(main: Callable[[list[str]], int | None], *, define_flags: Callable[[], None]) -> None:
    """Parses the flags, calls main(positional arguments) and ends the process with its exit code.

    A UserError, from the flags or from main, ends in one line on stderr and exit code 2. Other exceptions keep
    their traceback and exit code 1: they are ours, or the machine's, and a retry may help.
    """
    main_module = sys.modules["__main__"]
    program = f"python -m {main_module.__spec__.name}" if main_module.__spec__ else sys.argv[0]
    define_flags()
    flags.DEFINE_boolean("help", False, "Show this text and end.", short_name="h")
    _start_logging()
    try:
        arguments = flags.FLAGS(sys.argv)[1:]
        if flags.FLAGS.help:
            print(_help_text(program, main_module.__doc__ or "", sys.argv[0]))
            sys.exit(0)
        logging.set_verbosity(flags.FLAGS.verbosity)
        if logs_json():
            logging.get_absl_handler().setFormatter(_JsonLines())
            python_logging.captureWarnings(True)  # Python's own warnings too
        sys.exit(main(arguments) or 0)
    except OSError as error:
        if not str(error.filename).startswith("gs://"):
            raise
        _print_error(UserError(f"{error.filename}: {error.strerror}"), hint="")
        sys.exit(EXIT_RETRY if isinstance(error, TimeoutError) else EXIT_USER_ERROR)
    except (flags.Error, UserError) as error:
        _print_error(error, hint=f"`{program} --help` lists the flags." if isinstance(error, flags.Error) else "")
        sys.exit(EXIT_USER_ERROR)
    except Exception:
        if not logs_json():
            raise
        print(_json_line("CRITICAL", traceback.format_exc()), file=sys.stderr)  # one entry, not one for each line
        sys.exit(1)


def logs_json() -> bool:
    """Whether the log is to be lines of JSON: by --log_format, where the command has it, and where it runs."""
    if "log_format" not in flags.FLAGS:
        return False
    value = flags.FLAGS["log_format"].value
    on_platform = any(name in PLATFORM_VARIABLES or name.startswith("AIP_") for name in os.environ)
    return value == "json" or (value == "auto" and on_platform)


def shows_bars() -> bool:
    """Whether progress is shown as bars: on a terminal, unless the log is to be JSON."""
    return sys.stderr.isatty() and not logs_json()


def _print_error(error: Exception, *, hint: str) -> None:
    text = " ".join(str(error).split())
    if logs_json():
        print(_json_line("ERROR", f"{text} {hint}".strip()), file=sys.stderr)
    else:
        print(f"error: {text}", *([hint] if hint else []), sep="\n", file=sys.stderr)


# What Vertex AI sets for a custom job (with the AIP_ ones, which it sets for some), and Kubernetes for every container.
PLATFORM_VARIABLES = ("CLOUD_ML_PROJECT_ID", "KUBERNETES_SERVICE_HOST")


STARTUP_CHATTER = (b"All log messages before absl::InitializeLog", b"oneDNN custom operations are on")


def require(*names: str) -> None:
    """Raises UserError for the first of the flags that is not set.

    absl's own `required` would refuse `--help` too.
    """
    for name in names:
        if not flags.FLAGS[name].value:
            raise UserError(f"--{name} is not set: pass it. {flags.FLAGS[name].help}")


def flag_values(names: Iterable[str]) -> dict[str, Any]:
    """What the flags of those names are set to."""
    return {name: flags.FLAGS[name].value for name in names}


# Read by TensorFlow when it is loaded, and by no means later.
TENSORFLOW_ENVIRONMENT = {
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "KERAS_BACKEND": "tensorflow",
    # What TensorFlow fails to read of a bucket, trainer.bucket reads again, and counts it.
    "GCS_RETRY_CONFIG_MAX_RETRIES": "0",
    # TensorFlow fills a buffer of so many megabytes with zeros for each file it opens, by default 64: measured on 20 KB
    # pictures of a loopback bucket, 6 a second with 64, 155 with 1, 250 with 4.
    "GCS_READ_CACHE_BLOCK_SIZE_MB": "4",
}


def import_tensorflow() -> None:
    """Imports TensorFlow without the four lines that its C++ part writes to stderr whatever the log level.

    They come from before its logging is set up (port.cc in TensorFlow 2.21), so only the file descriptor can be held.
    Everything else that was written meanwhile is passed on.
    """
    for name, value in TENSORFLOW_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    python_logging.getLogger("tensorflow").setLevel(python_logging.WARNING)
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            import tensorflow  # noqa: F401
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            held.seek(0)
            os.write(2, b"".join(line for line in held if not any(text in line for text in STARTUP_CHATTER)))


def _start_logging() -> None:
    handler = logging.get_absl_handler()
    handler.setFormatter(_Lines())
    logging.use_absl_handler()
    flags.FLAGS.set_default("verbosity", 0)  # absl's own default hides everything below a warning


class _Lines(python_logging.Formatter):
    """`13:05:59 text`, with the level in front of what is worse than information."""

    def format(self, record: python_logging.LogRecord) -> str:
        level = "" if record.levelno <= python_logging.INFO else f"{record.levelname.lower()}: "
        return f"{self.formatTime(record, '%H:%M:%S')} {level}{record.getMessage()}"


class _JsonLines(python_logging.Formatter):
    """A record as Cloud Logging takes it from standard error, on Vertex AI and GKE alike."""

    def format(self, record: python_logging.LogRecord) -> str:
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return _json_line(record.levelname, text, record.created)


def _json_line(severity: str, text: str, seconds: float | None = None) -> str:
    """The fields that Cloud Logging knows (https://docs.cloud.google.com/logging/docs/structured-logging)."""
    time = datetime.datetime.fromtimestamp(seconds or datetime.datetime.now().timestamp(), datetime.UTC)
    return json.dumps({"severity": severity, "message": text, "time": time.isoformat()}, ensure_ascii=False)


def _help_text(program: str, docstring: str, module: str) -> str:
    """The module's own docstring, then its flags in the order of their definition, with their defaults."""
    width = min(shutil.get_terminal_size().columns, 110)
    lines = [docstring.strip(), "", f"Flags of {program}:"]
    own = flags.FLAGS.get_key_flags_for_module(module)  # those that it took over from another module too
    common = [flags.FLAGS["verbosity"], flags.FLAGS["help"]]
    for flag in [flag for flag in own if flag not in common] + common:
        values = "|".join(getattr(flag.parser, "enum_values", ()) or ())
        kind = values or flag.flag_type()
        default = "" if flag.default in (None, "") else f" (default: {flag.default_as_str})".replace("'", "")
        lines.append(f"  --{flag.name}={kind}" if not flag.boolean else f"  --[no]{flag.name}")
        lines += textwrap.wrap(
            " ".join((flag.help or "").split()) + default, width, initial_indent=" " * 6, subsequent_indent=" " * 6
        )
    lines += ["  --flagfile=FILE", "      Read flags from a file, one --name=value a line."]
    return "\n".join(lines)
