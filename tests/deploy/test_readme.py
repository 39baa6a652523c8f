"""deploy/README.md lists every file and overlay of deploy/, and names only files that exist."""

import re

from tests.support.paths import ROOT

README = (ROOT / "deploy" / "README.md").read_text()


def table(heading: str) -> set[str]:
    """The first cells, in backticks, of the tables under a heading."""
    section = README.split(f"## {heading}")[1].split("\n## ")[0]
    return set(re.findall(r"^\| `([^`]+)` \|", section, re.MULTILINE))


def test_the_vertex_table_lists_every_specification():
    assert table("Vertex AI") == {path.name for path in (ROOT / "deploy" / "vertex").glob("*.yaml")}


def test_the_kubernetes_table_lists_every_overlay():
    assert table("Kubernetes") == {path.name for path in (ROOT / "deploy" / "kubernetes" / "overlays").iterdir()}


def test_the_slurm_table_lists_every_file():
    assert table("Slurm") - {"scancel"} == {path.name for path in (ROOT / "deploy" / "slurm").iterdir()}


def test_the_page_says_for_each_specification_what_has_run_it():
    section = README.split("## Checks")[1].split("In detail:")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    listed = [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    folder = ROOT / "deploy"
    expected = [f"vertex/{path.name}" for path in (folder / "vertex").glob("*.yaml")]
    expected += [f"overlays/{path.name}" for path in (folder / "kubernetes" / "overlays").iterdir()] + ["katib"]
    expected += [f"slurm/{path.name}" for path in (folder / "slurm").iterdir()]
    assert sorted(listed) == sorted(expected)


def test_every_file_that_the_page_names_exists():
    named = set(re.findall(r"(?:deploy|tests)/[\w./-]*\w", README)) | {"cloudbuild.yaml"}
    assert len(named) >= 6
    for name in named:
        assert (ROOT / name).exists(), name


def test_no_role_is_owner_editor_or_admin():
    roles = set(re.findall(r"roles/[\w.]+", README))
    assert len(roles) >= 6
    assert not any(re.search(r"owner|editor|[aA]dmin", role) for role in roles)
