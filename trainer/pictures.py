"""A job's pictures, wherever they lie (a folder, a bucket, shards), as sources of batches; fetched once if they are kept."""

from collections.abc import Callable

import numpy as np
import tensorflow as tf

from trainer import data, examples, shards, storage
from trainer.examples import Folder, Split


class Pictures:
    """All pictures of a job, in the order of their paths, so that jobs of other splits share what is kept of them.

    `places` are the positions of those to train on and of those to validate, int64 [N] and [V]. `on_bad` is told the path
    of each that cannot be decoded; `failure` is what a bucket refused while TensorFlow was asking for a picture, since
    TensorFlow tells it in words of its own.
    """

    def __init__(
        self,
        data_dir: str,
        folder: Folder,
        sides: Split,
        *,
        image_size: int,
        cache: data.Cache,
        cache_dir: str,
        read_parallelism: int,
    ):
        paths = np.concatenate([side.paths for side in sides])
        order = np.argsort(paths)
        self.paths = paths[order]
        self.hashes = np.concatenate([side.hashes for side in sides])[order].tolist()
        self.places = np.split(np.argsort(order), [len(sides.training)])
        self.on_bad: Callable[[str], None] = lambda path: None
        self.failure: OSError | None = None
        self._data_dir, self._pack, self._image_size = data_dir, folder.pack, image_size
        self._cache, self._cache_dir = cache, cache_dir
        self._is_jpeg = folder.kinds == {"JPEG"}
        is_slow = storage.is_remote(data_dir) and not folder.pack
        self._parallelism = read_parallelism or (examples.REMOTE_PARALLELISM if is_slow else 0)
        self._staged: Callable[[str], bytes] | None = None
        self._table: data.Table | None = None

    @property
    def num_shards(self) -> int:
        """Shards that `stage` will bring here; 0 where there are none, or they are here."""
        return len(self._pack.manifest["shards"]) if self._pack and not self._staged else 0

    def stage(self, on_shard: Callable[[int], None]) -> None:
        """Brings shards to this machine, once. Raises UserError if they do not fit, OSError if they cannot be read."""
        if self._pack and not self._staged:
            self._staged = shards.stage(self._pack, self._cache_dir, on_shard)

    @property
    def num_undecoded(self) -> int:
        """Pictures that `decode` will keep decoded; 0 where they are not to be kept, or are."""
        return len(self.paths) if self._cache.is_used and not self._table else 0

    def decode(self, on_pictures: Callable[[int], None], worker: int) -> None:
        """Reads and decodes all pictures once, to be kept for all passes over them."""
        if self.num_undecoded:
            files = self._files(np.arange(len(self.paths)))
            self._table = data.decode_all(files, self._cache.path(f"all-{worker}"), on_pictures)

    @property
    def is_kept(self) -> bool:
        """Whether pictures are kept decoded between the passes over them."""
        return self._cache.is_used

    def source(self, places: np.ndarray) -> data.Table | data.Files:
        """The pictures at those places, in that order, as a source of batches."""
        return self._table._replace(places=tf.constant(places)) if self._table else self._files(places)

    def _files(self, places: np.ndarray) -> data.Files:
        directory = "" if self._pack else self._data_dir
        paths = self.paths[places]
        return data.Files(
            *(
                directory,
                paths,
                self._image_size,
                lambda index: self.on_bad(paths[index]),
                self.read,
                self._parallelism,
            ),
            is_jpeg=self._is_jpeg,
        )

    def read(self, path: str) -> bytes:
        """The bytes of a picture, b"" if it is gone. Raises OSError, and remembers it."""
        try:
            contents = self._staged(path) if self._staged else shards.read(self._data_dir, path)
        except OSError as error:
            self.failure = error
            raise
        return contents or b""
