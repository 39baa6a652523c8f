"""cloudbuild.yaml is valid for Cloud Build: fields of its proto, substitutions, order of the steps."""

import re

import pytest

from tests.support.paths import ROOT

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed: pip install '.[dev]'")
cloudbuild = pytest.importorskip(
    "google.cloud.devtools.cloudbuild_v1.types", reason="google-cloud-build is not installed: pip install '.[dev]'"
)
from google.protobuf import json_format  # noqa: E402 - after the check that its packages are installed

TEXT = (ROOT / "cloudbuild.yaml").read_text()
# https://cloud.google.com/build/docs/configuring-builds/substitute-variable-values
BUILT_IN = {
    "PROJECT_ID",
    "PROJECT_NUMBER",
    "BUILD_ID",
    "LOCATION",
    "TRIGGER_NAME",
    "COMMIT_SHA",
    "REVISION_ID",
    "SHORT_SHA",
    "REPO_NAME",
    "REPO_FULL_NAME",
    "BRANCH_NAME",
    "TAG_NAME",
    "REF_NAME",
    "SERVICE_ACCOUNT",
    "SERVICE_ACCOUNT_EMAIL",
}


def problems(text: str) -> list[str]:
    """Everything that Cloud Build rejects, and names that the Dockerfile or the Makefile does not define."""
    try:
        fields = yaml.safe_load(text)
        build = json_format.ParseDict(fields, cloudbuild.Build.pb()(), ignore_unknown_fields=False)
    except (yaml.YAMLError, json_format.ParseError) as error:
        return [str(error)]
    del fields["substitutions"]
    used = set(re.findall(r"(?<!\$)\$\{?([A-Z_][A-Z0-9_]*)\}?", yaml.safe_dump(fields)))
    defined = set(build.substitutions)
    errors = [f"undefined: {name}" for name in used - defined - BUILT_IN]
    errors += [f"unused: {name}" for name in defined - used]
    errors += [f"a user-defined name must start with _: {name}" for name in defined if not name.startswith("_")]
    before: set[str] = set()
    for step in build.steps:
        late = [name for name in step.wait_for if name not in before | {"-"}]
        errors += [f"{step.id} waits for {name}, which is not an earlier step" for name in late]
        if not step.wait_for:
            errors.append(f"{step.id} has no waitFor")
        before.add(step.id)
    built = {argument.removeprefix("--tag=") for step in build.steps for argument in step.args if "--tag=" in argument}
    errors += [f"{image} is pushed but not built" for image in build.images if image not in built]
    written = {argument.partition("=/workspace/")[2] for step in build.steps for argument in step.args}
    errors += [f"{path} is uploaded but not written" for path in build.artifacts.objects.paths if path not in written]
    dockerfile = (ROOT / "Dockerfile").read_text()
    for name in re.findall(r"--build-arg=(\w+)=", text):
        if not re.search(rf"^ARG {name}\b", dockerfile, re.MULTILINE) and name != "BUILDKIT_INLINE_CACHE":
            errors.append(f"the Dockerfile has no ARG {name}")
    for name in re.findall(r"--target=(\w+)", text):
        if f" AS {name}\n" not in dockerfile:
            errors.append(f"the Dockerfile has no stage {name}")
    for step in build.steps:
        if step.entrypoint == "make":
            makefile = (ROOT / "Makefile").read_text()
            errors += [f"the Makefile has no {name}" for name in step.args if f"\n{name}:" not in makefile]
    return errors


def test_cloudbuild_yaml_has_no_problems():
    assert problems(TEXT) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("waitFor", "waitfor"),
        ("waitFor: [build]", "waitFor: [biuld]"),
        ("  waitFor: [build]\n", ""),
        ("machineType: E2_HIGHCPU_8", "machineType: E2_HUGE"),
        ("substitutionOption: MUST_MATCH", "substitutionOption: MUST"),
        ("timeout: 3600s", "timeout: 1h"),
        ("${_REPOSITORY}", "${_REPO}"),
        ("  _VARIANT: gpu", "  _VARIANT: gpu\n  _MACHINE: x"),
        ("_TAG", "TAG"),
        ("--build-arg=VARIANT", "--build-arg=VARIANTS"),
        ("--target=packages", "--target=package"),
        ("args: [check]", "args: [checks]"),
        ("picture-trainer:${_TAG}\nartifacts", "picture-train:${_TAG}\nartifacts"),
        ("paths: [sbom.spdx.json]", "path: [sbom.spdx.json]"),
        ("    paths: [sbom.spdx.json]", "    paths: [sbom.json]"),
        ("--build-arg=BASE_IMAGE", "--build-arg=BASE"),
        ("logging: CLOUD_LOGGING_ONLY", "loging: CLOUD_LOGGING_ONLY"),
    ],
)
def test_an_error_is_detected(old, new):
    assert old in TEXT
    assert problems(TEXT.replace(old, new))


def test_an_unknown_field_anywhere_is_rejected():
    def insert(value):
        """Yields copies of the value, each with one unknown field in another of its objects."""
        if isinstance(value, dict):
            yield {**value, "unknownField": 1}
            for name, item in value.items():
                if name != "substitutions":
                    yield from ({**value, name: changed} for changed in insert(item))
        elif isinstance(value, list):
            for i, item in enumerate(value):
                yield from ([*value[:i], changed, *value[i + 1 :]] for changed in insert(item))

    copies = list(insert(yaml.safe_load(TEXT)))
    assert len(copies) >= 8
    for changed in copies:
        assert any("unknownField" in problem for problem in problems(yaml.safe_dump(changed)))


def test_the_image_has_a_provenance_and_a_list_of_its_packages():
    fields = yaml.safe_load(TEXT)
    assert fields["options"]["requestedVerifyOption"] == "VERIFIED"
    (image,) = fields["images"]
    (sbom,) = [step for step in fields["steps"] if step["id"] == "sbom"]
    assert f"docker:{image}" in sbom["args"]
    for step in fields["steps"]:  # a tag that moves would make two builds differ
        assert not step["name"].endswith(":latest")
        if "build" in step["args"]:
            assert "--build-arg=BASE_IMAGE=${_BASE_IMAGE}" in step["args"]


def test_the_image_is_pushed_after_all_tests_have_passed():
    steps = {step["id"]: step for step in yaml.safe_load(TEXT)["steps"]}
    pushing = [step for step in steps.values() if step.get("args", [""])[0] == "push"]
    assert pushing
    assert all("test" in step["waitFor"] for step in pushing)
    assert all(not step.get("allowFailure") for name, step in steps.items() if name != "cache")
    # Cloud Build pushes `images` after every step has succeeded; no step pushes them itself.
    assert "picture-trainer:${_TAG}" not in yaml.safe_dump(pushing)
