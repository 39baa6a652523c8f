"""The images of a job, wherever they are stored (folder, bucket, shards), as sources of batches.

Shapes: N training and V validation images.
"""

from collections.abc import Callable, Iterable

import numpy as np
import tensorflow as tf
from absl import logging

from trainer import config
from trainer.data import decoders, file_checks, input_pipeline, listing, shards
from trainer.data.dataset import Folder, Split
from trainer.data.input_pipeline import ArraySource, FileSource
from trainer.data.listing import BadFile
from trainer.data.preprocessing import NetworkInput
from trainer.storage import files


class ImageSource:
    """The training and validation images of a job, by path, so that jobs with other splits share the cached features.

    `split_indices` are the indices of the training and of the validation images, int64 [N] and [V]. `bad_files` are
    the files that could not be used so far, by path. `failure` is the last error of a bucket: TensorFlow, which calls
    `read`, replaces it by an error of its own.
    """

    def __init__(
        self,
        data_dir: str,
        folder: Folder,
        split: Split,
        *,
        network_input: NetworkInput,
        cache: input_pipeline.ImageCache,
        cache_dir: str,
        read_parallelism: int,
        max_bad_fraction: float,
    ):
        sides = (split.training, split.validation)
        paths = np.concatenate([side.paths for side in sides])
        order = np.argsort(paths)
        self.paths = paths[order]
        self.hashes = np.concatenate([side.hashes for side in sides])[order].tolist()
        self.set_split(split)
        self.bad_files = {bad.path: bad for bad in folder.bad_files}
        self.failure: OSError | None = None
        self._data_dir, self._pack, self._network_input = data_dir, folder.pack, network_input
        self._cache, self._cache_dir = cache, cache_dir
        self._num_files, self._max_bad_fraction = len(folder.examples) + len(folder.bad_files), max_bad_fraction
        self._is_jpeg = folder.formats == {"JPEG"}
        self._names_objects = any(files.is_remote(path) for path in self.paths)  # only a label file does
        is_slow = (files.is_remote(data_dir) or self._names_objects) and not folder.pack
        self._parallelism = read_parallelism or (config.REMOTE_READ_PARALLELISM if is_slow else 0)
        self._read_shards: Callable[[str], bytes] | None = None
        self._decoded: ArraySource | None = None

    def set_split(self, split: Split) -> None:
        """Splits the same images in this way from now on."""
        self.split_indices = [np.searchsorted(self.paths, side.paths) for side in (split.training, split.validation)]

    @property
    def num_unfetched_shards(self) -> int:
        """Number of shards that `fetch_shards` will copy to this machine."""
        return len(self._pack.manifest["shards"]) if self._pack and not self._read_shards else 0

    def fetch_shards(self, on_shard: Callable[[int], None]) -> None:
        """Copies shards to this machine, once. Raises UserError if they do not fit, OSError if they cannot be read."""
        if self._pack and not self._read_shards:
            self._read_shards = shards.fetch(self._pack, self._cache_dir, on_shard)

    @property
    def is_cached(self) -> bool:
        """Whether decoded images are kept between the passes over them."""
        return self._cache.is_used

    @property
    def num_undecoded(self) -> int:
        """Number of images that `decode` will decode and keep."""
        return len(self.paths) if self.is_cached and not self._decoded else 0

    def decode(self, on_images: Callable[[int], None], worker_index: int) -> None:
        """Reads and decodes all images once, for all passes over them."""
        if self.num_undecoded:
            source = self._file_source(np.arange(len(self.paths)))
            self._decoded = input_pipeline.decode_all(source, self._cache.path(f"all-{worker_index}"), on_images)

    def source(self, indices: np.ndarray) -> ArraySource | FileSource:
        """The images at those indices, in that order, as a source of batches."""
        return self._decoded._replace(indices=tf.constant(indices)) if self._decoded else self._file_source(indices)

    def _file_source(self, indices: np.ndarray) -> FileSource:
        paths = self.paths[indices]
        return FileSource(
            directory="" if self._pack or self._names_objects else self._data_dir,
            paths=paths,
            network_input=self._network_input,
            on_unreadable=lambda index: self.record_unreadable([paths[index]]),
            read=self.read,
            parallelism=self._parallelism,
            is_jpeg=self._is_jpeg,
        )

    def read(self, path: str) -> bytes:
        """The bytes of an image, b"" if it no longer exists. Raises OSError, and keeps it as `failure`."""
        try:
            contents = self._read_shards(path) if self._read_shards else shards.read(self._data_dir, path)
        except OSError as error:
            self.failure = error
            raise
        return contents or b""

    def record_unreadable(self, paths: Iterable[str]) -> None:
        """Adds images that could not be decoded to `bad_files`, each with the reason found now."""
        for path in paths:
            if path not in self.bad_files:
                self.bad_files[path] = BadFile(path, self._unreadable_reason(path))
                logging.warning("%s is left out: %s.", files.join(self._data_dir, path), self.bad_files[path].reason)

    def _unreadable_reason(self, path: str) -> str:
        if self._pack:
            return "its bytes in the shard are damaged: run trainer.pack again"
        if not files.is_remote(listing.join(self._data_dir, path)):
            check = file_checks.check_file(listing.join(self._data_dir, path))
            if check.reason:
                return check.reason
        return decoders.undecodable_reason(self.read(path)) or "cannot be decoded"

    def check_bad_fraction(self) -> None:
        """Raises UserError if more than `max_bad_fraction` of the files are bad.

        Not part of record_unreadable, which tf.data calls: it would wrap the error.
        """
        file_checks.check_bad_fraction(
            self.bad_files.values(), self._num_files, self._max_bad_fraction, data_dir=self._data_dir
        )
