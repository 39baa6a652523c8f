"""Data of several tests of buckets: transient faults, an error message of Google's, and the upload of a folder."""

import pathlib

from trainer.storage import files

# Transient faults, as arguments of gcs_emulator.Emulator.inject.
FAULTS = ({"status": 429}, {"status": 500}, {"status": 503}, {"drop": True}, {"lose": True})
SERVICE_ACCOUNT = "trainer@project.iam.gserviceaccount.com"
DENIED = f"{SERVICE_ACCOUNT} does not have storage.objects.list access to the Google Cloud Storage bucket."


def upload(directory: pathlib.Path, url: str) -> str:
    """Uploads all files below a folder; returns `url`."""
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    files.parallel(
        lambda path: files.atomic_write(files.join(url, str(path.relative_to(directory))), path.read_bytes()), paths
    )
    return url
