"""Start and end of every command: flags, help, logging, one-line errors and exit codes.

Exit codes: 0 success; 2 the user must change something; 143 stopped by a signal after a checkpoint; 75 and others: a
retry may help. Importing this module does not import TensorFlow, so that `--help` and wrong flags return at once.
"""

import datetime
import difflib
import json
import logging as python_logging
import os
import re
import shlex
import shutil
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

from absl import flags, logging

import trainer
from trainer.errors import UserError, require_posix

# The commands of picture-trainer and `python -m trainer`, with the modules that they run.
COMMANDS = {
    "train": "task",
    "predict": "predict",
    "evaluate": "evaluate",
    "inspect": "inspect_data",
    "pack": "pack",
    "serve": "serve",
    "tune": "tune",
    "report": "report",
    "benchmark": "benchmark",
    "demo": "task",
}

EXIT_USER_ERROR = 2
EXIT_RETRY = 75  # EX_TEMPFAIL of sysexits.h
EXIT_STOPPED = 143  # 128 + SIGTERM, as Kubernetes and Vertex AI report a process that the signal ended

# Vertex AI sets the first for a custom job, for some AIP_ variables too; Kubernetes sets the second in each container.
PLATFORM_VARIABLES = ("CLOUD_ML_PROJECT_ID", "KUBERNETES_SERVICE_HOST")

# TensorFlow reads these when it is imported.
TENSORFLOW_ENVIRONMENT = {
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "KERAS_BACKEND": "tensorflow",
    # TensorFlow uses oneDNN by default only on x86 processors with AVX512-VNNI or AMX. With AVX2 alone (an AMD EPYC, two
    # cores) a training step of ResNet50, 32 images of 96 pixels, takes 2.46 s with oneDNN and 4.37 s without.
    "TF_ENABLE_ONEDNN_OPTS": "1",
    # trainer.storage.gcs retries failed reads of a bucket, and counts the retries.
    "GCS_RETRY_CONFIG_MAX_RETRIES": "0",
    # TensorFlow zero-fills a buffer of this many megabytes, 64 by default, for each file that it opens. Measured on
    # 20 KB images of a loopback bucket: 6 images per second with 64, 155 with 1, 250 with 4.
    "GCS_READ_CACHE_BLOCK_SIZE_MB": "4",
}

COLORS = {"red": 31, "green": 32, "yellow": 33}  # of ANSI terminals

# Parts of the lines that TensorFlow 2.21 writes to stderr at any log level.
STARTUP_CHATTER = (b"All log messages before absl::InitializeLog", b"oneDNN custom operations are on")


def run(main: Callable[[list[str]], int | None], *, define_flags: Callable[[], None]) -> None:
    """Parses the flags, calls main(positional arguments) and exits with its return value, 0 for None.

    A UserError, from the flags or from main, is printed as one line on stderr, with exit code 2. So is an OSError of a
    bucket, with exit code 75 for a timeout, and a lack of memory. Other exceptions keep their traceback and exit code 1: a
    retry may help.
    """
    define_flags()
    flags.DEFINE_boolean("help", False, "Show this help and exit.", short_name="h")
    flags.DEFINE_boolean("version", False, "Show the version and exit.")
    _start_logging()
    try:
        arguments = flags.FLAGS([sys.argv[0], *_with_flag_file_paths(sys.argv[1:])])[1:]
        arguments = [os.path.expanduser(argument) for argument in arguments]
        if flags.FLAGS.help or flags.FLAGS.version:
            print(_help_text(main.__module__) if flags.FLAGS.help else version())
            sys.exit(0)
        require_posix()
        logging.set_verbosity(flags.FLAGS.verbosity)
        complete_paths(flags.FLAGS)
        if logs_json():
            logging.get_absl_handler().setFormatter(_JsonLines())
            python_logging.captureWarnings(True)  # log the warnings of Python as well
        sys.exit(main(arguments) or 0)
    except (flags.Error, UserError) as error:
        print_error(error, hint=f"`{program()} --help` lists the flags." if isinstance(error, flags.Error) else "")
        sys.exit(EXIT_USER_ERROR)
    except Exception as error:
        is_timeout = isinstance(error, TimeoutError) and error.filename is not None
        if isinstance(error, OSError) and (is_timeout or str(error.filename).startswith("gs://")):
            print_error(UserError(f"{error.filename}: {error.strerror}"))
            sys.exit(EXIT_RETRY if is_timeout else EXIT_USER_ERROR)
        if advice := memory_error(error):  # a retry would fail at the same place
            print_error(advice)
            sys.exit(EXIT_USER_ERROR)
        if not logs_json():
            raise
        print(_json_line("CRITICAL", traceback.format_exc()), file=sys.stderr)  # one entry, not one per line
        sys.exit(1)


def program() -> str:
    """This command as the user started it: `picture-trainer train`, `python -m trainer train` or `python -m trainer.task`."""
    specification = sys.modules["__main__"].__spec__
    if specification is None or specification.name == "trainer.__main__":
        return sys.argv[0]
    return f"python -m {specification.name}"


def command(module: str) -> str:
    """How to start the command of `module`, for example predict, in the way that the user started this one."""
    prefix, _, own_name = program().rpartition(" ")
    names = {module: name for name, module in reversed(COMMANDS.items())}
    return f"{prefix} {names[module]}" if own_name in COMMANDS else f"python -m trainer.{module}"


def this_command(*more_flags: str, without: str = "") -> str:
    """The command line of this process with more flags at its end, to be pasted; of equal flags the last one counts.

    `without` is the name of a boolean flag that is left out, or negated if it is in a flag file. Only the flags in a process
    that is not a command of this project.
    """
    if not flags.FLAGS.is_parsed():
        return shlex.join(more_flags)
    given = [word for word in sys.argv[1:] if word.partition("=")[0] not in (f"--{without}", f"-{without}")]
    negated = [f"--no{without}"] if without and len(given) == len(sys.argv) - 1 else []
    return f"{program()} {shlex.join([*given, *more_flags, *negated])}"


def version() -> str:
    """The line that --version prints."""
    return f"picture-trainer {trainer.__version__}"


def parse(define_flags: Callable[[flags.FlagValues], None], given: Mapping[str, Any]) -> flags.FlagValues:
    """The flags of a command with the values `given` by name, as a Python program passes them, apart from flags.FLAGS.

    Raises UserError for an unknown flag, or a value that is not one of its kind, with the words of the command line.
    """
    values = flags.FlagValues()
    define_flags(values)
    try:
        for name, value in given.items():
            if name not in values:
                raise flags.UnrecognizedFlagError(name, suggestions=difflib.get_close_matches(name, values, n=1))
            if isinstance(value, os.PathLike):
                value = os.fspath(value)
            elif isinstance(value, bool) and not values[name].boolean:
                value = str(value)  # True would be the number 1
            values[name].parse(value)
    except flags.Error as error:
        raise UserError(str(error)) from None
    values.mark_as_parsed()
    complete_paths(values)
    return values


def complete_paths(values: flags.FlagValues) -> None:
    """Expands `~` in the flags, which the shell does only where a word begins. Raises UserError for one that is not UTF-8."""
    for name in list(values):
        value = values[name].value
        if not isinstance(value, str):
            continue
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UserError(f"--{name}={value!a} is not UTF-8: rename it, or pass a link to it.") from None
        if value.startswith("~"):
            values[name].value = os.path.expanduser(value)


def logs_json() -> bool:
    """Whether log lines are JSON: --log_format, where the command defines it; `auto` means on a cloud platform."""
    if "log_format" not in flags.FLAGS:
        return False
    value = flags.FLAGS["log_format"].value
    on_platform = any(name in PLATFORM_VARIABLES or name.startswith("AIP_") for name in os.environ)
    return value == "json" or (value == "auto" and on_platform)


def shows_bars() -> bool:
    """Whether progress is shown as bars: on a terminal, unless log lines are JSON or not shown."""
    return sys.stderr.isatty() and not logs_json() and logging.get_absl_logger().isEnabledFor(python_logging.INFO)


def colored(text: str, color: str) -> str:
    """The text in that color of COLORS, on a terminal on which https://no-color.org is not asked for."""
    if not sys.stderr.isatty() or os.environ.get("NO_COLOR") or logs_json():
        return text
    return f"\x1b[{COLORS[color]}m{text}\x1b[0m"


def memory_error(error: Exception) -> UserError | None:
    """What was too large, and what to try, if Python or TensorFlow could not allocate memory; else None."""
    # TensorFlow is not imported here. XLA raises an InternalError with this status in its text.
    is_tensorflow = type(error).__module__.startswith("tensorflow.")
    # cuDNN finds no algorithm where none fits in the memory of the GPU (tensorflow#45068, #60713).
    texts = ("RESOURCE_EXHAUSTED", "CUDA_ERROR_OUT_OF_MEMORY", "CUDNN_STATUS_ALLOC_FAILED", "No algorithm worked!")
    is_exhausted = type(error).__name__ == "ResourceExhaustedError" or any(text in str(error) for text in texts)
    if not isinstance(error, MemoryError) and not (is_tensorflow and is_exhausted):
        return None
    reason = (str(error).splitlines() or [""])[0][:200] or type(error).__name__
    sizes = [f"--{name}={flags.FLAGS[name].value}" for name in ("batch_size", "image_size") if name in flags.FLAGS]
    advice = "pass a smaller --batch_size" if sizes else "use a machine with more memory"
    if "accumulate_steps" in flags.FLAGS:
        advice = "pass --accumulate_steps=auto, which computes the same batch in parts, or a smaller --batch_size"
    return UserError(f"There is not enough memory for {' '.join(sizes) or 'this command'} ({reason}): {advice}.")


def exit_at_once(code: int) -> NoReturn:
    """Ends the process without waiting for anything."""
    logging.flush()
    os._exit(code)


def print_error(error: Exception, *, hint: str = "") -> None:
    """Prints an error as one line."""
    text = " ".join(str(error).split())
    if logs_json():
        print(_json_line("ERROR", f"{text} {hint}".strip()), file=sys.stderr)
    else:
        print(f"{colored('error:', 'red')} {text}\n{hint}".strip(), file=sys.stderr)


def require(*names: str, values: flags.FlagValues = flags.FLAGS) -> None:
    """Raises UserError for the first flag that is not set.

    absl's `required` would also reject `--help`.
    """
    for name in names:
        if not values[name].value:
            raise UserError(f"--{name} is not set: pass it. {values[name].help}")


def flag_values(names: Iterable[str], values: flags.FlagValues = flags.FLAGS) -> dict[str, Any]:
    """Values of the flags by name."""
    return {name: values[name].value for name in names}


def given_flags(names: Iterable[str]) -> list[str]:
    """Those of the flags that the command line or a flag file sets."""
    return [name for name in names if flags.FLAGS[name].present]


def import_tensorflow() -> None:
    """Imports TensorFlow without the four lines that its C++ code writes to stderr at any log level.

    It writes them before its logging is initialized (port.cc in TensorFlow 2.21), so the file descriptor is redirected
    during the import. All other lines are written to stderr afterwards.
    """
    for name, value in TENSORFLOW_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    keras = sys.modules.get("keras")
    backend = keras.config.backend() if keras else os.environ["KERAS_BACKEND"]
    if backend != "tensorflow":
        raise UserError(f"The backend of Keras is {backend}, expected tensorflow: unset KERAS_BACKEND.")
    if sys.modules.get("tensorflow"):
        return
    python_logging.getLogger("tensorflow").setLevel(python_logging.WARNING)
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as captured:
        os.dup2(captured.fileno(), 2)
        try:
            import tensorflow  # noqa: F401
        except ModuleNotFoundError as error:
            if error.name != "tensorflow":
                raise
            raise UserError(
                "TensorFlow is not installed: pip install tensorflow-cpu on Linux on x86-64, 'tensorflow[and-cuda]' on "
                "Linux with an NVIDIA GPU, tensorflow elsewhere."
            ) from None
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            captured.seek(0)
            os.write(2, b"".join(line for line in captured if not any(text in line for text in STARTUP_CHATTER)))


def _start_logging() -> None:
    handler = logging.get_absl_handler()
    handler.setFormatter(Lines())
    logging.use_absl_handler()
    flags.FLAGS.set_default("verbosity", 0)  # absl's default hides everything below a warning


class Lines(python_logging.Formatter):
    """`13:05:59 text`, with the level before the text of warnings and errors."""

    def format(self, record: python_logging.LogRecord) -> str:
        """The line of a log record."""
        color = "red" if record.levelno >= python_logging.ERROR else "yellow"
        level = "" if record.levelno <= python_logging.INFO else colored(f"{record.levelname.lower()}:", color) + " "
        return f"{self.formatTime(record, '%H:%M:%S')} {level}{record.getMessage()}"


class _JsonLines(python_logging.Formatter):
    """A log record as Cloud Logging parses it from standard error, on Vertex AI and GKE."""

    def format(self, record: python_logging.LogRecord) -> str:
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return _json_line(record.levelname, text, record.created)


def _json_line(severity: str, text: str, seconds: float | None = None) -> str:
    """A line with the fields of https://docs.cloud.google.com/logging/docs/structured-logging."""
    time = datetime.datetime.fromtimestamp(seconds or datetime.datetime.now().timestamp(), datetime.UTC)
    return json.dumps({"severity": severity, "message": text, "time": time.isoformat()}, ensure_ascii=False)


def _with_flag_file_paths(arguments: list[str]) -> list[str]:
    """The arguments, with the path of this project's flag file NAME in `--flagfile=NAME`, unless a file has that name."""
    package = os.path.dirname(__file__)

    def path(match: re.Match[str]) -> str:
        places = [os.path.join(package, "flags"), os.path.join(os.path.dirname(package), "deploy", "flags")]
        paths = [match[2], *(os.path.join(place, f"{match[2]}.flags") for place in places)]
        return match[1] + next(filter(os.path.isfile, paths), match[2])

    return [re.sub(r"^(--?flagfile=)(\w+)$", path, argument) for argument in arguments]


def _help_text(module: str) -> str:
    """The docstring of the command, then its flags in the order of definition, with their defaults."""
    width = min(shutil.get_terminal_size().columns, 110)
    docstring = (sys.modules[module].__doc__ or "").strip()
    docstring = re.sub(r"\bpython -m trainer\.(\w+)", lambda match: command(match[1]), docstring)
    lines = [docstring, "", f"Flags of {program()}:"]
    # absl knows the flags of the main module by the name of the program. Flags adopted from other modules are included.
    key_flags = flags.FLAGS.get_key_flags_for_module(sys.argv[0] if module == "__main__" else module)
    common = [flags.FLAGS["verbosity"], flags.FLAGS["help"], flags.FLAGS["version"]]
    for flag in [flag for flag in key_flags if flag not in common] + common:
        values = "|".join(getattr(flag.parser, "enum_values", ()) or ())
        kind = values or flag.flag_type()
        default = "" if flag.default in (None, "") else f" (default: {flag.default_as_str})".replace("'", "")
        lines.append(f"  --{flag.name}={kind}" if values or not flag.boolean else f"  --[no]{flag.name}")
        indent = " " * 6
        help_text = " ".join((flag.help or "").split()).removeprefix(f"<{values}>: ")  # absl repeats the choices
        lines += textwrap.wrap(help_text + default, width, initial_indent=indent, subsequent_indent=indent)
    lines += ["  --flagfile=FILE", "      Read flags from a file, one --name=value per line; or article or demo."]
    return "\n".join(lines)
