"""A training job: from a folder of pictures, one sub-folder per class, to a classifier that can be served.

    import trainer
    result = trainer.train(data_dir="pictures", job_dir="job")
    result.classifier.predict("photo.jpg")

`train`, `load`, `evaluate` and `inspect` are the commands as functions, see trainer/api.py. They are imported, and TensorFlow
with them, when they are used.
"""

from typing import TYPE_CHECKING, Any

from trainer.errors import UserError

if TYPE_CHECKING:
    from trainer.api import (
        Classifier,
        Evaluation,
        Inspection,
        Prediction,
        Report,
        Result,
        evaluate,
        inspect,
        load,
        train,
    )

__version__ = "0.1.0"
__all__ = [
    "Classifier",
    "Evaluation",
    "Inspection",
    "Prediction",
    "Report",
    "Result",
    "UserError",
    "evaluate",
    "inspect",
    "load",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'trainer' has no attribute {name!r}")
    import importlib

    api = importlib.import_module("trainer.api")
    # All at once: trainer/api.py imports the module trainer.evaluate, which Python then binds here in place of the function.
    globals().update({name: getattr(api, name) for name in __all__})
    return globals()[name]
