"""scripts/gpu_check with a small network, so that a test can run it on a CPU. Not a test itself.

python tiny_gpu_check.py [any flag of scripts/gpu_check]
"""

import importlib.machinery
import importlib.util
import sys

from tests.support import paths, tiny_job
from trainer import cli


def load():
    """The module of scripts/gpu_check."""
    loader = importlib.machinery.SourceFileLoader("gpu_check", str(paths.ROOT / "scripts" / "gpu_check"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
    sys.modules[loader.name] = module  # dataclasses looks its types up there
    loader.exec_module(module)
    return module


if __name__ == "__main__":
    gpu_check = load()

    def main(arguments: list[str]) -> int:
        """Like gpu_check.main, with the small network."""
        return gpu_check.main(arguments, task=(str(paths.TINY_JOB),), build=tiny_job.build)

    cli.run(main, define_flags=gpu_check.define_flags)
