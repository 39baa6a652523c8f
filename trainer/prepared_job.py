"""The values of a job: what a command prepares, and that with the machine that it runs on."""

import dataclasses
from collections.abc import Callable
from typing import Any

from trainer.artifacts.job_dir import JobDir
from trainer.config import Config
from trainer.data.dataset import Folder, Split
from trainer.data.image_source import ImageSource
from trainer.data.preprocessing import NetworkInput
from trainer.models import backbones, networks
from trainer.models.networks import Network
from trainer.runtime.cluster import Cluster
from trainer.runtime.devices import Devices
from trainer.runtime.signals import StopRequest
from trainer.training.cost import Cost
from trainer.training.interruption import StopReason
from trainer.training.progress import ProgressReporter


@dataclasses.dataclass(frozen=True, eq=False)
class PreparedJob:
    """What a command hands over: everything that is decided before TensorFlow starts.

    `report_metrics` receives each row of the history, those of earlier starts too; `on_epoch` those of this start, when
    the files of the epoch are written. `on_lock_lost` is called, on a thread, if another job has taken the job_dir; it must
    end this one. `build_network` is models.networks.build, or a function with the same arguments.
    """

    settings: Config
    cluster: Cluster
    folder: Folder
    split: Split
    split_origin: str
    fingerprint: str
    profile_range: tuple[int, int] | None
    epochs_reason: str  # why --epochs of `settings` has its value
    started_at: float  # in seconds of time.time
    stop: StopRequest
    report_metrics: Callable[[dict], None]
    on_epoch: Callable[[dict], None]
    on_lock_lost: Callable[[], None]
    build_network: Callable[..., Network] = networks.build
    is_split_final: bool = True  # False: it does not know yet what is similar

    @property
    def network_input(self) -> NetworkInput:
        """How images become the input of the network."""
        return backbones.input_from_flags(self.settings.as_dict())


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """A prepared job with the machine that it runs on and the folder that it writes to."""

    prepared: PreparedJob
    devices: Devices
    precision: str
    xla: bool
    paths: JobDir
    resolved: dict[str, Any]  # what config.json says of the values that the flags left open
    cost: Cost
    progress: ProgressReporter
    images: ImageSource

    @property
    def settings(self) -> Config:
        """The flags."""
        return self.prepared.settings

    @property
    def is_chief(self) -> bool:
        """Whether this worker writes."""
        return self.prepared.cluster.is_chief

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes, in the order of the network's outputs."""
        return self.prepared.folder.class_names

    @property
    def feature_dir(self) -> str:
        """Where the features of the frozen backbone are kept."""
        return self.settings.cache_dir or self.paths.checkpoints

    def stop_requested(self) -> StopReason:
        """Why this worker asks to stop; only the chief looks at the cost."""
        if self.prepared.stop.is_set():
            return StopReason.SIGNAL
        return StopReason.COST_LIMIT if self.cost.limit_reached() else StopReason.NONE
