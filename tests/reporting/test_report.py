"""The report shows the files in job_dir at any point of a run, whatever the names of the classes."""

import base64
import hashlib
import html.parser
import io
import json
import pathlib
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.support.written_job import CLASSES, HISTORY, MATH, SCRIPT, make_job_dir, write_csv, write_many_classes
from trainer.artifacts.job_dir import LABEL_ISSUE_COLUMNS, JobDir
from trainer.artifacts.metrics import expected_calibration_error, metrics_of_test_set, wilson_interval
from trainer.reporting import live, report

PNGS = ("accuracy.png", "val_accuracy.png", "loss.png", "val_loss.png", "confusion_matrix.png", "mistakes.png")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The job_dir of a finished run with its report."""
    job_dir = make_job_dir(tmp_path_factory.mktemp("finished"))
    report.write(str(job_dir))
    return job_dir


class Page(html.parser.HTMLParser):
    """The visible text, the tags and their attributes."""

    VOID = frozenset(("meta", "link", "img", "br", "input"))

    def __init__(self, job_dir, name="report/index.html"):
        super().__init__()
        self.open_tags, self.tags, self.texts, self.prose = [], [], [], ""  # prose: the texts outside of code
        self.feed((job_dir / name).read_text("utf-8"))
        self.close()
        assert not self.open_tags
        self.text = " ".join(" ".join(self.texts).replace("\u00a0", " ").split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open_tags.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open_tags.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & {*self.open_tags}:
            self.texts.append(data)
            self.prose += "" if "code" in self.open_tags else data

    def images(self):
        return [attributes for tag, attributes in self.tags if tag == "img"]


def assert_is_drawn(path):
    with Image.open(path) as image:
        image.load()
        assert 400 <= image.width <= 3000
        assert 300 <= image.height <= 3000
        assert len(np.unique(np.asarray(image.convert("L")))) > 20  # not blank


def test_every_figure_is_drawn(finished):
    assert sorted(path.name for path in (finished / "report").iterdir()) == sorted((*PNGS, "index.html"))
    for name in PNGS:
        assert_is_drawn(finished / "report" / name)


def test_the_page_needs_no_network_and_allows_its_own_script_alone(finished):
    page = Page(finished)
    (script,) = re.findall(r"<script>(.*?)</script>", (finished / "report/index.html").read_text("utf-8"), re.DOTALL)
    (policy,) = (tag["content"] for _, tag in page.tags if tag.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.split("script-src ")[1] == f"'sha256-{digest}'"
    assert "default-src 'none'" in policy
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert "://" not in (value or ""), (tag, name)
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href"):
                assert value.startswith(("data:", "#"))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    style = re.search(r"<style>(.*?)</style>", (finished / "report/index.html").read_text("utf-8"), re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style


def test_markup_in_names_is_shown_as_text(finished):
    page = Page(finished)
    for name in CLASSES:
        assert name in page.texts  # in the table of classes, as one text
    assert "shapes & <b>sizes" in page.texts
    assert "not a <picture>" in page.text
    assert "CPU without <bf16>" in page.text


def test_metrics_in_the_page_equal_the_files(finished):
    text = Page(finished).text
    assert "75 %" in text
    assert "6 of 8 validation images are classified correctly" in text
    low, high = wilson_interval(6, 8)
    assert f"is {100 * low:.0f} % to {100 * high:.0f} %" in text
    assert "Best epoch 3 of 4" in text
    assert "Training images 16" in text
    assert "Bad files 1" in text
    assert "Total time 1 min 23 s" in text
    assert "Cost at 3.5 per hour 0.08" in text
    assert "the whole network was trained on 4.2 images per second" in text
    assert "best epoch 3: 87.50 %" in text  # in the curves
    assert "0.9137" in text  # in the table of epochs
    assert f"{SCRIPT} predicted as {MATH} , 93 %" in text
    assert "--batch_size 24 32" in text  # differs from its default
    assert "--image_size 64" in text
    assert "CPU:0, CPU:1" in text
    probability, correct = [0.9321] * 2 + [0.71, 0.74, 0.77, 0.77, 0.8, 0.8], [0, 0, 1, 1, 1, 1, 1, 1]
    assert f"{100 * expected_calibration_error(probability, correct):.2f} %" in text


def test_the_accuracy_of_the_test_set_leads_the_page_and_the_model_card(tmp_path):
    job_dir = make_job_dir(tmp_path)
    paths = JobDir(str(job_dir))
    labels = np.arange(4).repeat(10)
    test = metrics_of_test_set(labels, np.eye(4, dtype=np.float32)[np.where(labels < 3, labels, 0)], CLASSES)
    paths.write_metrics({**paths.read_metrics(), "test": test})
    with open(paths.split, "a") as file:
        file.writelines(f"test/{i}.png,{MATH},test,{i}\n" for i in range(40))
    live.write_all(str(job_dir))
    text = Page(job_dir).text
    assert "30 of 40 test images are classified correctly" in text
    assert text.index("75 % 30 of 40 test images") < text.index("on the 8 validation images")
    assert "Training images 16 Validation images 8 Test images 40" in text
    card = pathlib.Path(paths.model_card).read_text()
    assert "16 training images, 8 validation images, 40 test images" in card
    assert "30 of 40 test images; balanced accuracy 75" in card


def test_the_page_has_commands_to_use_the_model(finished):
    text = Page(finished).text
    assert f"python -m trainer.predict --model_dir={finished}/saved_model IMAGE" in text
    assert f"python -m trainer.serve --model_dir={finished}/saved_model" in text
    assert '{"instances": [{"bytes": {"b64": "' in text


def test_images_are_thumbnails_and_unreadable_ones_gray(finished):
    images = {}
    for attributes in Page(finished).images():
        image = Image.open(io.BytesIO(base64.b64decode(attributes["src"].split(",")[1])))
        images[attributes["alt"]] = image
        assert max(image.size) == 240
    assert images[f"{SCRIPT}/0.png"].size == (216, 240)  # made from 360 x 400
    gray = np.asarray(images[f"{MATH}/1.png"].convert("RGB"), dtype=int)[0, 0]
    assert np.ptp(gray) < 20
    assert len(images) == 8


def test_a_run_without_an_epoch_has_a_report(tmp_path):
    job_dir = make_job_dir(tmp_path, history=(), with_predictions=False, finished=False)
    report.write(str(job_dir))
    page = Page(job_dir)
    assert "Training run in progress" in page.text
    assert "No epoch is complete" in page.text
    assert not page.images()
    assert sorted(path.name for path in (job_dir / "report").iterdir()) == sorted((*PNGS, "index.html"))


def test_a_running_job_shows_its_best_epoch(tmp_path):
    job_dir = make_job_dir(tmp_path, history=HISTORY[:1], with_predictions=False, finished=False)
    report.write(str(job_dir))
    text = Page(job_dir).text
    assert "1 of 5 epochs done" in text
    assert "62 % After epoch 1, 5 of 8 validation images are classified correctly" in text
    assert "Confusion matrix" not in text
    for name in PNGS[:4]:
        assert_is_drawn(job_dir / "report" / name)


def test_a_fitted_head_is_one_epoch_that_nothing_was_chosen_for(tmp_path):
    job_dir = make_job_dir(tmp_path, history=HISTORY[:1], finished=False)
    config = json.loads((job_dir / "config.json").read_text())
    config["flags"] |= {"head_epochs": -1, "epochs": 0}
    (job_dir / "config.json").write_text(json.dumps(config))
    report.write(str(job_dir), only_page=True)
    assert "a head fitted by logistic regression" in Page(job_dir).text
    assert "1 of 1 epochs done" in Page(job_dir).text
    assert "Neither training nor a choice has used these images" in Page(job_dir).text
    config["flags"]["epochs"] = 3
    (job_dir / "config.json").write_text(json.dumps(config))
    report.write(str(job_dir), only_page=True)
    assert "a head fitted by logistic regression, then 3 epochs of the whole network" in Page(job_dir).text
    assert "1 of 4 epochs done" in Page(job_dir).text


ESTIMATE = {"accuracy": 0.9, "low": 0.8, "high": 0.95, "correct": 18, "images": 20, "balanced_accuracy": 0.6,
            "balanced_low": 0.5, "balanced_high": 0.7}  # fmt: skip


def with_metrics(job_dir, **values):
    metrics = json.loads((job_dir / "metrics.json").read_text())
    (job_dir / "metrics.json").write_text(json.dumps({**metrics, **values}))


def test_the_cross_validated_accuracy_leads_and_the_validation_accuracy_is_second(tmp_path):
    job_dir = make_job_dir(tmp_path, history=HISTORY[:1])
    with_metrics(job_dir, cross_validated=ESTIMATE)
    report.write(str(job_dir), only_page=True)
    text = Page(job_dir).text
    lead = (
        "90 % 18 of 20 training and validation images are classified correctly by a head that was fitted without them"
    )
    assert lead in text
    assert "is 80 % to 95 %. Validation accuracy: 75 % (41 % to 93 %)" in text
    assert "They leave out images from elsewhere" in text


def test_the_balanced_accuracy_leads_if_a_class_is_rare(tmp_path):
    job_dir = make_job_dir(tmp_path)
    with open(job_dir / "split.csv", "a", encoding="utf-8") as file:
        file.writelines(f"{MATH}/{number}.png,{MATH},training,{number}\n" for number in range(100, 140))
    report.write(str(job_dir), only_page=True)
    text = Page(job_dir).text
    assert "75 % Balanced accuracy: the mean over the classes" in text
    assert "6 of 8 validation images are classified correctly" in text
    assert f"has 4 images, “{MATH}” has 44. --class_weight=balanced would count" in text
    with_metrics(job_dir, cross_validated=ESTIMATE)
    report.write(str(job_dir), only_page=True)
    assert "60 % Balanced accuracy" in Page(job_dir).text
    assert "(95 % interval: 50 % to 70 %)" in Page(job_dir).text


def test_labels_to_check_are_shown_with_training_images(tmp_path):
    job_dir = make_job_dir(tmp_path)
    rows = [(f"{SCRIPT}/5.png", SCRIPT, MATH, "0.015"), (f"{MATH}/0.png", MATH, SCRIPT, "0.25")]
    write_csv(job_dir / "label_issues.csv", LABEL_ISSUE_COLUMNS, rows)
    report.write(str(job_dir), only_page=True)
    assert "Labels to check" not in Page(job_dir).text  # of an earlier end of this run
    with_metrics(job_dir, label_issues=2, labels_examined=24, labels_judged_by="out_of_fold")
    report.write(str(job_dir), only_page=True)
    page = Page(job_dir)
    assert "Each of 24 training and validation images" in page.text
    assert f"{SCRIPT} or rather {MATH} ? {SCRIPT}/5.png; 1.5 % for the label; training" in page.text
    assert f"{SCRIPT}/5.png" in [attributes["alt"] for attributes in page.images()]
    with_metrics(job_dir, label_issues=0, labels_examined=8, labels_judged_by="validation")
    write_csv(job_dir / "label_issues.csv", LABEL_ISSUE_COLUMNS, [])
    report.write(str(job_dir), only_page=True)
    text = Page(job_dir).text
    assert "training images were not examined. For 0 another class is more probable than the label." in text
    assert "An image that is not listed may still have a wrong label." in text


@pytest.mark.slow
def test_a_finished_run_that_resumes_with_more_epochs_is_in_progress(tmp_path):
    job_dir = make_job_dir(tmp_path)
    metrics = json.loads((job_dir / "metrics.json").read_text())
    for epochs, state in (([2, 3], "Finished training run"), ([2, 1], "Training run in progress: 4 of 5 epochs")):
        (job_dir / "metrics.json").write_text(json.dumps({**metrics, "epochs": epochs}))
        report.write(str(job_dir), only_page=True)
        assert state in Page(job_dir).text


def test_the_same_files_give_the_same_page(finished):
    before = (finished / "report/index.html").read_bytes()
    report.write(str(finished))
    assert (finished / "report/index.html").read_bytes() == before


def test_an_evaluation_has_a_report_without_curves(tmp_path):
    job_dir = make_job_dir(tmp_path, history=(), mistakes=False)
    (job_dir / "split.csv").unlink()
    config = json.loads((job_dir / "config.json").read_text())
    config["flags"] = {"data_dir": config["flags"]["data_dir"], "model_dir": "/models/a b", "report_dir": str(job_dir)}
    (job_dir / "config.json").write_text(json.dumps(config))
    (job_dir / "metrics.json").write_text(json.dumps({"val_accuracy": 1.0}))
    report.write(str(job_dir), report_dir=str(job_dir), only_page=True)
    text = Page(job_dir, "index.html").text
    assert "Evaluation" in text
    assert "8 of 8 images are classified correctly" in text
    assert "None: all images are classified correctly." in text
    assert "--model_dir='/models/a b' IMAGE" in text


@pytest.mark.slow
def test_the_time_of_each_stage_is_shown_by_activity(tmp_path):
    job_dir = make_job_dir(tmp_path, timed=True)
    report.write(str(job_dir))
    text = Page(job_dir).text
    assert "Head only, 2 epochs: 6.0 s" in text
    assert "input wait: 1.0 s, 17 % compute: 3.0 s, 50 % validation: 1.0 s, 17 % saving: 1.0 s, 17 %" in text
    assert "Whole network, 1 epoch: 40 s" in text
    assert "80 % of the images per second that the devices reach" in text


def heat_layers(page):
    return [a["src"] for tag, a in page.tags if tag == "img" and a.get("class") == "heat"]


def test_heat_maps_cover_their_images(tmp_path):
    job_dir = make_job_dir(tmp_path, explained=True)
    report.write(str(job_dir), only_page=True)
    layers = heat_layers(Page(job_dir))
    assert len(layers) == 2 + 8  # mistakes and least certain ones
    heat = np.asarray(Image.open(io.BytesIO(base64.b64decode(layers[0].split(",")[1]))))
    assert heat.shape == (80, 72, 4)  # in the proportions of the thumbnail of 216 x 240
    assert np.unravel_index(heat[..., 3].argmax(), (80, 72)) == pytest.approx((40, 36), abs=4)
    assert heat[:12, :, 3].max() < 30


def test_look_alikes_are_shown_side_by_side_with_the_accuracy_without_them(tmp_path):
    job_dir = make_job_dir(tmp_path)
    metrics = json.loads((job_dir / "metrics.json").read_text())
    pair = {"path": f"{SCRIPT}/0.png", "label": SCRIPT, "training_path": f"{MATH}/3.png", "training_label": MATH}
    alike = {
        "images": 3,
        "examined": 8,
        "val_accuracy_without": 0.6,
        "min_cosine": 0.95,
        "pairs": [{**pair, "cosine": 0.9713}],
    }
    (job_dir / "metrics.json").write_text(json.dumps({**metrics, "look_alikes": alike}))
    report.write(str(job_dir), only_page=True)
    page = Page(job_dir)
    assert (
        "3 of 8 validation images look like a training image: the cosine of their features is above 0.95" in page.text
    )
    assert "Without them the validation accuracy is 60.00 % , with them 75.00 %" in page.text
    assert "0.971, two labels" in page.text
    alternatives = [attributes["alt"] for attributes in page.images()]
    index = alternatives.index(f"{MATH}/3.png")
    assert alternatives[index - 1] == f"{SCRIPT}/0.png"
    assert ("a", {"href": "#look-alikes"}) in page.tags
    metrics["look_alikes"] = {**alike, "images": 0, "val_accuracy_without": 0.75, "pairs": []}
    (job_dir / "metrics.json").write_text(json.dumps(metrics))
    report.write(str(job_dir), only_page=True)
    assert "None of 8 validation images look like a training image" in Page(job_dir).text


def test_a_report_of_1000_classes_has_an_image_and_the_worst_classes(tmp_path):
    job_dir = make_job_dir(tmp_path)
    write_many_classes(job_dir, 1000)
    report.write(str(job_dir), only_page=True)
    page = Page(job_dir)
    assert "class 0003 class 0004 2 of 2 100.0 %" in page.text
    assert "image" in [tag for tag, _ in page.tags]  # in the figure of the matrix
    assert "1,000 classes; each cell is the largest share in a block of 4 by 4" in page.text
    assert "The first 100 of 1,000 classes; metrics.json lists all." in page.text
    classes = page.texts[page.texts.index("Classes", page.texts.index("Most confused classes")) :]
    assert "class 0003" in classes  # whose images are predicted as class 4
    assert "class 0999" not in classes
    assert (job_dir / "report" / "index.html").stat().st_size < 500_000


def test_the_report_is_in_the_language_of_the_run_or_of_the_command(finished, tmp_path):
    config = json.loads((finished / "config.json").read_text())
    spanish_job = shutil.copytree(finished, tmp_path / "job")
    (spanish_job / "config.json").write_text(json.dumps({**config, "flags": {**config["flags"], "language": "es"}}))
    report.write(str(spanish_job), only_page=True)
    page = Page(spanish_job)
    assert ("html", {"lang": "es"}) in page.tags
    assert "75 % 6 de 8 imágenes de validación se clasifican bien" in page.text
    assert "mejor época 3: 87,50 %" in page.text  # in the curves
    assert "predicha como" in page.text
    words = {"the", "of", "is", "and", "images", "epoch", "accuracy", "loss", "class", "file", "best", "from"}
    prose = page.prose.partition("Las opciones que difieren")[0]  # their values are English
    assert not words & set(re.findall(r"\w+", prose))
    report.write(str(spanish_job), report_dir=str(tmp_path / "english"), only_page=True, language="en")
    assert ("html", {"lang": "en"}) in Page(tmp_path, "english/index.html").tags


def test_the_page_is_the_same_without_the_other_figures(finished, tmp_path):
    report.write(str(finished), report_dir=str(tmp_path), only_page=True)
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]
    assert (tmp_path / "index.html").read_bytes() == (finished / "report" / "index.html").read_bytes()


@pytest.mark.slow
def test_a_run_that_augments_shows_augmented_images(tmp_path):
    job_dir = make_job_dir(tmp_path)
    config = json.loads((job_dir / "config.json").read_text())
    config["flags"] |= {"augment": True, "epochs": 2, "seed": 0, "image_size": 32}
    (job_dir / "config.json").write_text(json.dumps(config))
    report.write(str(job_dir))
    figure = (job_dir / "report" / "augmentation.svg").read_text("utf-8")
    assert figure.count("data:image/png") == 16
    page = (job_dir / "report" / "index.html").read_text("utf-8")
    section = page[page.index('id="augmentation"') :]
    assert section.count("data:image/png") == 16
    assert "#ffffff" not in section  # the panel has the color of the page, also in dark mode
    report.write(str(job_dir), only_page=True)  # takes the figure from the file
    assert (job_dir / "report" / "index.html").read_text("utf-8") == page


@pytest.mark.parametrize("changed", [{"augment": False, "epochs": 2}, {"augment": True, "epochs": 0}])
def test_a_run_that_does_not_augment_shows_none(tmp_path, changed):
    job_dir = make_job_dir(tmp_path)
    config = json.loads((job_dir / "config.json").read_text())
    config["flags"] |= changed
    (job_dir / "config.json").write_text(json.dumps(config))
    report.write(str(job_dir), only_page=True)
    assert not (job_dir / "report" / "augmentation.svg").exists()
    assert 'id="augmentation"' not in (job_dir / "report" / "index.html").read_text("utf-8")


def test_the_report_has_the_temperature_and_the_errors_without_and_with_it(tmp_path):
    job_dir = make_job_dir(tmp_path)
    metrics = json.loads((job_dir / "metrics.json").read_text())
    metrics["calibration"] = {"temperature": 1.234, "ece_before": 0.08, "ece_after": 0.02, "low": 0.01, "high": 0.05}
    (job_dir / "metrics.json").write_text(json.dumps(metrics))
    report.write(str(job_dir))
    text = Page(job_dir).text
    assert "2.00 % (95 % interval 1.0 % to 5.0 %)" in text
    assert "a temperature of 1.23, which makes the model less confident" in text
    assert "Without it the error is 8.00 %" in text


def test_the_report_says_how_many_images_are_refused(tmp_path):
    job_dir = make_job_dir(tmp_path)
    metrics = json.loads((job_dir / "metrics.json").read_text())
    metrics["novelty"] = {"threshold": 0.31234, "refused_validation": 0.048}
    (job_dir / "metrics.json").write_text(json.dumps(metrics))
    report.write(str(job_dir))
    text = Page(job_dir).text
    assert "novel above a novelty of 0.312, which holds for 4.8 % of the validation images" in text
