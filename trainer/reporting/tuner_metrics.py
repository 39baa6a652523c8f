"""The metrics of each epoch, reported to a hyperparameter tuner: Vertex AI's file, Katib's standard output."""

from collections.abc import Callable, Mapping
from typing import Any

REPORTED_METRICS = ("val_accuracy", "val_loss")
KATIB_TRIAL_VARIABLE = "KATIB_TRIAL_NAME"


def make_reporter(environment: Mapping[str, str]) -> Callable[[dict[str, Any]], None]:
    """A function that reports one row of history.csv, chosen by the variables that a tuner sets in its trials.

    CLOUD_ML_TRIAL_ID (Vertex AI) or CLOUD_ML_HP_METRIC_FILE (also trainer.tune): JSON lines in that file, by
    cloudml-hypertune, which reads both variables itself. KATIB_TRIAL_NAME: `val_accuracy=0.9312` on standard output,
    which Katib's StdOut collector parses. Neither: the function does nothing.
    """
    reporters = []
    if environment.get("CLOUD_ML_TRIAL_ID") or environment.get("CLOUD_ML_HP_METRIC_FILE"):
        reporters.append(_hypertune_reporter())
    if environment.get(KATIB_TRIAL_VARIABLE):
        reporters.append(_print_metrics)

    def report(row: dict[str, Any]) -> None:
        for reporter in reporters:
            reporter(row)

    return report


def _hypertune_reporter() -> Callable[[dict[str, Any]], None]:
    import hypertune

    tuner = hypertune.HyperTune()

    def report(row: dict[str, Any]) -> None:
        for name in REPORTED_METRICS:
            tuner.report_hyperparameter_tuning_metric(name, row[name], global_step=row["epoch"])

    return report


def _print_metrics(row: dict[str, Any]) -> None:
    # One metric per line: Katib parses a time at the start of a line, and no other order.
    lines = [f"epoch={row['epoch']}", *(f"{name}={row[name]:.6g}" for name in REPORTED_METRICS)]
    print("\n".join(lines), flush=True)
