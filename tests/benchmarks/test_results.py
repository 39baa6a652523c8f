"""Ratios of a suite, and the files of the results."""

import io
import json
import math
import warnings

import numpy as np
import pytest
from PIL import Image

from trainer.benchmarks import results
from trainer.benchmarks.suite import Baseline, Suite, Target


@pytest.fixture
def measured():
    """A suite of two baselines in three rounds."""
    fast, slow = iter([1.0, 10.0, 100.0]), iter([2.0, 20.0, 50.0])
    baselines = [Baseline("f", lambda: {"s": next(fast)}), Baseline("g", lambda: {"s": next(slow), "mib": 7})]
    lower = Target("g / f", metric="s", numerator="g", denominator="f", bound=2.0)
    upper = Target("g / f", metric="s", numerator="g", denominator="f", bound=1.9, at_least=False)
    suite = Suite("demo", "a title", "s", baselines, targets=[lower, upper], omitted=["h: not installed"])
    return results.measure(suite, rounds=3)


def test_a_ratio_is_the_median_of_the_ratios_of_the_rounds(measured):
    assert measured["figures"] == {"f": {"s": [1, 10, 100]}, "g": {"s": [2, 20, 50], "mib": [7, 7, 7]}}
    assert [(target["ratio"], target["is_met"]) for target in measured["aims"]] == [(2.0, True), (2.0, False)]


def test_rounds_alternate_between_the_baselines():
    order = []
    baselines = [Baseline(name, lambda name=name: order.append(name) or {"s": 1.0}) for name in ("f", "g")]
    results.measure(Suite("demo", "a title", "s", baselines), rounds=2)
    assert order == ["f", "g", "f", "g"]


def test_the_table_has_median_minimum_and_maximum(measured):
    table = results.suite_table(measured)
    assert "## demo: a title (3 rounds)" in table
    assert "| g | 20 (2 to 50)  | 7   |" in table
    assert "Not measured: h: not installed." in table


def test_markdown_lists_machine_note_and_targets(measured):
    machine = results.machine()
    text = results.markdown({"machine": machine, "note": "On a shared machine.", "suites": [measured]})
    assert f"{machine['processor']}, {machine['cores']} core{'s' if machine['cores'] > 1 else ''}, load" in text
    assert "On a shared machine." in text
    assert "| g / f | at least 2 | 2.00 | met |" in text
    assert "| g / f | at most 1.9 | 2.00 | missed |" in text


def test_the_chart_is_a_png_with_bars(measured):
    png = results.chart({"machine": results.machine(), "suites": [measured, measured]})
    with Image.open(io.BytesIO(png)) as chart:
        assert chart.format == "PNG"
        assert chart.width > 800
        assert len(np.unique(np.asarray(chart.convert("RGB")).reshape(-1, 3), axis=0)) > 20


def test_earlier_suites_are_kept_from_the_same_machine_only(measured, tmp_path):
    assert results.read_earlier(str(tmp_path)) == []
    machine = results.machine()
    other = {**measured, "suite": "other"}
    results.write(str(tmp_path), {"machine": machine, "note": "", "suites": [measured, other]})
    assert results.read_earlier(str(tmp_path)) == [measured, other]
    path = tmp_path / "benchmark.json"
    path.write_text(json.dumps({"machine": {**machine, "cores": 1000}, "suites": [measured]}))
    assert results.read_earlier(str(tmp_path)) == []


def test_a_suite_replaces_the_earlier_one_of_its_title_but_for_other_baselines(measured):
    other = {**measured, "title": "other"}
    again = {**measured, "figures": {"g": {"seconds": [7.0]}}}
    kept, replaced = results.add([measured, other], again)
    assert kept == other
    assert replaced["figures"] == {"f": measured["figures"]["f"], "g": {"seconds": [7.0]}}


def test_a_goal_that_is_not_reached_is_said_in_the_table_and_drawn_without_a_bar():
    baselines = [Baseline("fast", lambda: {"s": 3.0}), Baseline("never", lambda: {"s": math.inf})]
    target = Target("ratio", "s", "never", "fast", 2.0, at_least=False)
    measured = results.measure(Suite("demo", "a title", "s", baselines, targets=[target]), 1)
    page = results.markdown({"machine": {**results.machine(), "cores": 1}, "note": "", "suites": [measured]})
    assert "| never | not reached |" in page
    assert "| ratio | at most 2 | not reached | missed |" in page
    assert ", 1 core," in page
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results.chart({"machine": results.machine(), "note": "", "suites": [measured]})
