"""The image: its linter, its locked packages, and a build and runs with podman."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from tests.support import manifests
from tests.support.paths import ROOT

IMAGE = "localhost/picture-trainer"  # its name in container_check.sh
FASTEST_ARGS = ["--job_dir=/tmp/job", "--weights=none", "--head_epochs=0", "--epochs=1", "--image_size=32"]


def hadolint(dockerfile: str) -> subprocess.CompletedProcess:
    beside_python = pathlib.Path(sys.executable).parent / "hadolint"
    program = str(beside_python) if beside_python.exists() else shutil.which("hadolint")
    if not program:
        pytest.skip("no hadolint: pip install '.[dev]'")
    return subprocess.run([program, "-"], input=dockerfile, capture_output=True, text=True, check=False)


def test_hadolint_reports_nothing_for_the_dockerfile():
    text = (ROOT / "Dockerfile").read_text()
    assert hadolint(text).stdout == ""
    assert hadolint(text.replace('["python3", "-m", "trainer.task"]', "python3 -m trainer.task")).returncode == 1
    assert hadolint(text.replace("COPY trainer trainer", "ADD trainer trainer")).returncode == 1


def test_dockerignore_admits_only_program_files_and_no_secrets():
    allowed = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in allowed if line and not line.startswith("#")]
    assert rules[0] == "*"  # everything except what the next rules name
    assert [rule for rule in rules if rule.startswith("!")] == [
        "!deploy",
        "!deploy/flags",
        "!deploy/image",
        "!trainer",
    ]
    dockerfile = (ROOT / "Dockerfile").read_text().lower()
    assert not any(word in dockerfile for word in ("token", "password", "secret", "key=", "credentials"))


def normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def locked(variant: str) -> dict[str, str]:
    """Version by package of deploy/image; fails if a package has no hash."""
    text = (ROOT / "deploy" / "image" / f"{variant}.txt").read_text()
    blocks = re.findall(r"^(\S.*(?:\n    .*)*)", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE), re.MULTILINE)
    versions = {}
    for block in blocks:
        name, version = re.match(r"([\w.-]+)==(\S+) ", block).groups()
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", block), name
        versions[normalized(name)] = version
    return versions


@pytest.mark.parametrize(("variant", "tensorflow"), [("cpu", "tensorflow-cpu"), ("gpu", "tensorflow")])
def test_the_image_has_the_packages_of_setup_by_version_and_hash(variant, tensorflow):
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    pins = {normalized(name): version for name, version in pins.items()}
    packages = locked(variant)
    assert {name: pins.get(name, version) for name, version in packages.items()} == packages  # as tested
    required = re.findall(r'^ {8}"([\w.-]+)>=', (ROOT / "setup.py").read_text(), re.MULTILINE)
    assert len(required) > 10
    assert {normalized(name) for name in required} | {tensorflow} <= set(packages)
    assert packages[tensorflow] == pins["tensorflow"] == pins["tensorflow-cpu"]


def test_the_gpu_image_pins_the_cuda_packages():
    """The requirements of tensorflow[and-cuda]: without pins, a later build would install other versions."""
    assert {"nvidia-cublas-cu12", "nvidia-cudnn-cu12", "nvidia-nccl-cu12"} <= set(locked("gpu"))


def local_pod(name: str) -> dict:
    """The pod of an overlay without GPU, node selection and bucket, which only a cluster has; its security context is kept."""
    (pods,) = manifests.all_pods(manifests.render(name))
    spec, container = pods.spec, pods.container
    for field in ("nodeSelector", "tolerations", "serviceAccountName", "automountServiceAccountToken"):
        del spec[field]
    container |= {"image": IMAGE, "imagePullPolicy": "Never", "args": FASTEST_ARGS}
    del container["envFrom"], container["resources"]["limits"]["nvidia.com/gpu"]
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "trainer-pod", **pods.template["metadata"]},
        "spec": spec,
    }


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_image_builds_runs_restricted_and_resumes(tmp_path):
    missing = [name for name in ("podman", "runc", "mmdebstrap") if not shutil.which(name)]
    if missing or os.geteuid() != 0:
        pytest.skip(
            f"requires root and, on Debian: apt-get install -y --no-install-recommends podman runc catatonit mmdebstrap"
            f" (missing: {', '.join(missing) or 'root'})"
        )
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed: pip install '.[dev]'")
    pod = tmp_path / "trainer.yaml"
    pod.write_text(yaml.safe_dump(local_pod("overlays/one-gpu")))
    check = subprocess.run(
        [str(ROOT / "tests" / "support" / "container_check.sh")],
        capture_output=True,
        text=True,
        env={**os.environ, "POD": str(pod)},
        check=False,
    )
    sys.stderr.write(check.stderr)  # the duration of each step; pytest shows it with -rP
    assert check.returncode == 0, check.stderr
