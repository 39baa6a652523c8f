"""The figures of each epoch for what tunes the flags: Vertex AI's file, Katib's standard output."""

from collections.abc import Callable, Mapping

REPORTED_METRICS = ("val_accuracy", "val_loss")


KATIB_TRIAL_VARIABLE = "KATIB_TRIAL_NAME"


def make_reporter(environment: Mapping[str, str]) -> Callable[[dict], None]:
    """What takes one row of history.csv (a dict) after each epoch, by the variables that a tuner sets in its trials.

    CLOUD_ML_TRIAL_ID (Vertex AI) or CLOUD_ML_HP_METRIC_FILE (trainer.tune too): JSON lines in that file, by
    cloudml-hypertune, which reads both variables itself. KATIB_TRIAL_NAME: `val_accuracy=0.9312` on standard output,
    as Katib's StdOut collector looks for. Neither: nothing.
    """
    sinks = []
    if environment.get("CLOUD_ML_TRIAL_ID") or environment.get("CLOUD_ML_HP_METRIC_FILE"):
        sinks.append(_hypertune())
    if environment.get(KATIB_TRIAL_VARIABLE):
        sinks.append(_print)

    def tell(row: dict) -> None:
        for sink in sinks:
            sink(row)

    return tell


def _hypertune() -> Callable[[dict], None]:
    import hypertune

    reporter = hypertune.HyperTune()

    def tell(row: dict) -> None:
        for name in REPORTED_METRICS:
            reporter.report_hyperparameter_tuning_metric(name, row[name], global_step=row["epoch"])

    return tell


def _print(row: dict) -> None:
    # Each metric on a line of its own: Katib takes a time at the head of a line, and no other order.
    print(f"epoch={row['epoch']}", *(f"{name}={row[name]:.6g}" for name in REPORTED_METRICS), sep="\n", flush=True)
