"""deploy/README.md names what is there, all of it, and nothing else."""

import re

from tests.support.paths import ROOT

README = (ROOT / "deploy" / "README.md").read_text()


def table(heading: str) -> set[str]:
    """The first cells, in backquotes, of the tables under a heading."""
    section = README.split(f"## {heading}")[1].split("\n## ")[0]
    return set(re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE))


def test_every_specification_for_vertex_is_in_its_table():
    assert table("Vertex AI") == {path.name for path in (ROOT / "deploy" / "vertex").glob("*.yaml")}


def test_every_overlay_is_in_its_table():
    assert table("Kubernetes") == {path.name for path in (ROOT / "deploy" / "kubernetes" / "overlays").iterdir()}


def test_every_file_that_a_command_names_is_there():
    named = set(re.findall(r"(?:deploy|tests)/[\w./-]*\w", README)) | {"cloudbuild.yaml"}
    assert len(named) >= 6
    for name in named:
        assert (ROOT / name).exists(), name


def test_no_role_lets_anybody_do_everything():
    roles = set(re.findall(r"roles/[\w.]+", README))
    assert len(roles) >= 6
    assert not any(re.search(r"owner|editor|[aA]dmin", role) for role in roles)
