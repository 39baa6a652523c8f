"""The figure of a study of trainer.tune: validation accuracy over the trials and over each tuned flag."""

import io
from typing import Any

from trainer.reporting.plots import INK, MUTED, PAPER, TRAINING, VALIDATION
from trainer.storage import files


def write(path: str, trials: list, names: list[str], scales: dict[str, str]) -> None:
    """Writes the PNG file of `draw`, whose arguments the others are."""
    buffer = io.BytesIO()
    draw(trials, names, scales).savefig(buffer, format="png", dpi=130)
    files.atomic_write(path, buffer.getvalue())


def draw(trials: list, names: list[str], scales: dict[str, str]) -> Any:
    """A matplotlib Figure: panels of val_accuracy over the number of the trial and over each flag of `names`.

    `trials` are Optuna's, complete or pruned; `scales` is matplotlib's scale of each flag's axis.
    """
    from matplotlib import ticker
    from matplotlib.figure import Figure

    complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
    pruned = [trial for trial in trials if trial.state.name == "PRUNED"]  # whose `value` is that of the last epoch
    figure = Figure(figsize=(3.6 * (len(names) + 1), 3.6), layout="constrained", facecolor=PAPER)
    panels = figure.subplots(1, len(names) + 1, sharey=True, squeeze=False)[0]
    for panel, name in zip(panels, ["trial", *names], strict=True):
        _draw_trials(panel, name, complete, pruned)
        panel.set_xscale(scales.get(name, "linear"))
    panels[0].set_ylabel("val_accuracy", color=INK)
    panels[0].set_ylim(top=min(panels[0].get_ylim()[1], 1.004))  # no accuracy above 1
    panels[0].xaxis.set_major_locator(ticker.MaxNLocator(integer=True, min_n_ticks=1))
    best_so_far = [max(t.value for t in complete if t.number <= trial.number) for trial in complete]
    panels[0].step([trial.number for trial in complete], best_so_far, where="post", color=VALIDATION, linewidth=1)
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def _draw_trials(panel: Any, name: str, complete: list, pruned: list) -> None:
    def x(trial: Any) -> float:
        return trial.number if name == "trial" else trial.params[name]

    best = max(complete, key=lambda trial: trial.value)
    best_values = [max(trial.intermediate_values.values()) for trial in pruned]
    panel.scatter([x(trial) for trial in pruned], best_values, color=MUTED, marker="x", label="pruned")
    panel.scatter(
        [x(trial) for trial in complete], [trial.value for trial in complete], color=TRAINING, label="complete"
    )
    panel.scatter([x(best)], [best.value], s=140, facecolors="none", edgecolors=VALIDATION, label="best")
    panel.set_xlabel(name, color=INK)
    panel.grid(alpha=0.3)
    panel.spines[["top", "right"]].set_visible(False)
