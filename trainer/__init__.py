"""A training job: from a folder of pictures, one sub-folder per class, to a classifier that can be served."""

__version__ = "0.1.0"
