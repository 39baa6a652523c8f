"""scripts/audit, with the real pip-audit, against a file of advisories."""

import importlib.machinery
import importlib.util
import json
import subprocess
import sys
import zipfile

import pytest

from tests.support.paths import ROOT

SCRIPT = ROOT / "scripts" / "audit"


def advisory(identifier: str, name: str, **affected) -> dict:
    package = {"ecosystem": "PyPI", "name": name}
    return {"schema_version": "1.6.0", "id": identifier, "affected": [{"package": package, **affected}]}


def in_range(**events: str) -> dict:
    return {"ranges": [{"type": "ECOSYSTEM", "events": [{name: version} for name, version in events.items()]}]}


def run(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def audit():
    loader = importlib.machinery.SourceFileLoader("audit", str(SCRIPT))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("affected", "expected"),
    [
        (in_range(introduced="0", fixed="2.0"), True),
        (in_range(introduced="0", fixed="1.5"), False),
        (in_range(fixed="1.10", introduced="1.2"), True),
        (in_range(introduced="0", last_affected="1.5"), True),
        (in_range(introduced="0", last_affected="1.4.9"), False),
        (in_range(introduced="1.6"), False),
        ({"versions": ["1.4", "1.5"]}, True),
        ({"versions": ["1.4"]}, False),
    ],
)
def test_an_advisory_names_versions_or_ranges(audit, affected, expected):
    assert audit.affects(advisory("A", "Some_Package", **affected), "some-package", "1.5") is expected
    assert not audit.affects(advisory("A", "other", **affected), "some-package", "1.5")


@pytest.mark.slow
def test_a_known_vulnerability_of_the_image_is_found_without_a_network(tmp_path):
    if not (ROOT / "deploy/image/cpu.txt").read_text().count("starlette=="):
        pytest.fail("the test needs a package of the image")
    archive = tmp_path / "all.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("A.json", json.dumps(advisory("GHSA-new", "starlette", **in_range(introduced="0", fixed="99.0"))))
        file.writestr("B.json", json.dumps(advisory("GHSA-old", "starlette", **in_range(introduced="0", fixed="0.1"))))
    found = run(archive)
    if "Failed to fetch" in found.stderr or "connection" in found.stderr.lower():
        pytest.skip("pip-audit cannot be installed here: no package index")
    assert found.returncode == 1, found.stderr
    assert "GHSA-new" in found.stdout
    assert "99.0" in found.stdout
    assert "GHSA-old" not in found.stdout + found.stderr
    (tmp_path / "none.json").write_text(
        json.dumps([advisory("GHSA-old", "starlette", **in_range(introduced="0", fixed="0.1"))])
    )
    clean = run(tmp_path / "none.json")
    assert clean.returncode == 0, clean.stderr


@pytest.mark.parametrize("text", ["", "{}", "[]", "[1]"])
def test_a_file_without_advisories_is_one_line_with_exit_code_2(tmp_path, text):
    path = tmp_path / "advisories.json"
    path.write_text(text)
    done = run(path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {path} ")
    assert "pass a .zip or a .json of OSV advisories" in done.stderr
    assert len(done.stderr.splitlines()) == 1
