# The image of the job: docker build --build-arg VARIANT=gpu --tag trainer .
#   docker run --gpus=all --shm-size=1g -v "$PWD/pictures:/data:ro" -v "$PWD/out:/job" --user "$(id -u):$(id -g)" \
#     trainer --data_dir=/data --job_dir=/job --require_gpu
# The second entry point serves the exported model, also on Vertex AI (deploy/README.md):
#   docker run -p 8080:8080 -v "$PWD/out:/job" --entrypoint python trainer \
#     -m trainer.serve --model_dir=/job/saved_model --host=0.0.0.0
# Only /tmp and job_dir must be writable: --read-only --tmpfs=/tmp --cap-drop=ALL.
#
# The base is Python with CUDA from pip, not an image of TensorFlow: tensorflow/tensorflow:2.18.0-gpu lacked cuDNN 9 and ran
# on the CPU without a warning (https://github.com/tensorflow/tensorflow/issues/81344). The host provides the driver.
# Any base with Python 3.11 to 3.13 and venv works; in production, specify it by digest.
ARG BASE_IMAGE=docker.io/library/python:3.11-slim-bookworm

FROM ${BASE_IMAGE} AS packages
ARG VARIANT=cpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /build
COPY deploy/image ./
# Each package is pinned by version and hash; `make lock` resolves them from setup.py and constraints.txt. pip stays outside
# the environment that it fills. The code is copied later, so that a code change does not reinstall TensorFlow.
RUN case "${VARIANT}" in cpu | gpu) ;; *) echo "VARIANT is '${VARIANT}': expected cpu or gpu" >&2; exit 2 ;; esac \
    && python3 -m venv pip \
    && python3 -m venv --without-pip /opt/venv \
    && pip/bin/pip --python /opt/venv/bin/python3 install --require-hashes --requirement "${VARIANT}.txt"

FROM ${BASE_IMAGE}
COPY --from=packages /opt/venv /opt/venv
WORKDIR /app
# Caches, home directory and bytecode are in /tmp, the only writable folder. CUDA requires the driver capabilities `compute`
# and `utility`; the caller chooses the GPUs, not the image.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONPATH=/app \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    KERAS_HOME=/tmp/keras \
    MPLCONFIGDIR=/tmp/matplotlib \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY deploy/flags deploy/flags
COPY trainer trainer
# A numeric user, so that Kubernetes can verify runAsNonRoot. The image runs as any other user too.
USER 65532:65532
HEALTHCHECK NONE
# The exec form: Python is process 1 and receives SIGTERM, on which the job writes a checkpoint and exits with code 143.
ENTRYPOINT ["python3", "-m", "trainer.task"]

ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="picture-trainer" \
      org.opencontainers.image.description="From a folder of pictures to a classifier that can be served: one distributed training job." \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
