"""A study as a picture: how the trials went, and the accuracy over each flag that was tried."""

import io
from typing import Any

from trainer import storage

PAPER, INK, MUTED, FIRST, SECOND = "#ffffff", "#1f2328", "#8b949e", "#2b6cb0", "#c2531b"


def draw(path: str, trials: list, names: list[str], scales: dict[str, str]) -> None:
    """Writes a PNG: panels of val_accuracy over the trial's number and over each flag of `names`.

    `trials` are Optuna's, complete or ended early; `scales` is matplotlib's scale of each flag's axis.
    """
    from matplotlib.figure import Figure

    complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
    ended_early = [trial for trial in trials if trial.state.name == "PRUNED"]  # whose `value` is only the last one told
    figure = Figure(figsize=(3.6 * (len(names) + 1), 3.6), layout="constrained", facecolor=PAPER)
    panels = figure.subplots(1, len(names) + 1, sharey=True, squeeze=False)[0]
    for panel, name in zip(panels, ["trial", *names], strict=True):

        def place(trial: Any, name: str = name) -> float:
            return trial.number if name == "trial" else trial.params[name]

        early = [max(trial.intermediate_values.values()) for trial in ended_early]
        panel.scatter([place(t) for t in ended_early], early, color=MUTED, marker="x", label="ended early")
        panel.scatter([place(t) for t in complete], [t.value for t in complete], color=FIRST, label="complete")
        best = max(complete, key=lambda trial: trial.value)
        panel.scatter([place(best)], [best.value], s=140, facecolors="none", edgecolors=SECOND, label="best")
        panel.set_xscale(scales.get(name, "linear"))
        panel.set_xlabel(name, color=INK)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("val_accuracy", color=INK)
    so_far = [max(t.value for t in complete if t.number <= trial.number) for trial in complete]
    panels[0].step([trial.number for trial in complete], so_far, where="post", color=SECOND, linewidth=1)
    panels[0].legend(frameon=False, fontsize=8)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130)
    storage.write_whole(path, image.getvalue())
