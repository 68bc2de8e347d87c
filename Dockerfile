# The image of `deepnarrow launch --print k8s`. PyTorch's wheels bring CUDA, cuDNN and NCCL; of the node it needs the
# driver, which NVIDIA's container runtime puts into it.
#   docker build --tag deepnarrow .
# flash-attn is compiled where there is no wheel of it, and needs CUDA's compiler for that:
#   docker build --tag deepnarrow --build-arg BASE=nvidia/cuda:12.8.1-devel-ubuntu24.04 --build-arg EXTRA=gpu .
ARG BASE=python:3.12-slim
FROM ${BASE}

# gcc: Triton compiles a launcher for each kernel. git: a run notes its commit.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc g++ git libc6-dev python3 python3-dev python3-pip python3-venv \
    && rm -rf /var/lib/apt/lists/*

# Whichever Python the base has first; its own packages stay as they are.
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

# What it stands on is a layer of its own, which a change of the code leaves as it is. An extra comes second, and is built
# beside what is there: flash-attn's build imports PyTorch.
WORKDIR /opt/deepnarrow
COPY pyproject.toml README.md LICENSE ./
ARG EXTRA=
RUN mkdir deepnarrow && touch deepnarrow/__init__.py \
    && pip install --no-cache-dir . \
    && if [ -n "$EXTRA" ]; then pip install --no-cache-dir --no-build-isolation ".[$EXTRA]"; fi \
    && pip uninstall --yes deepnarrow

COPY . /opt/deepnarrow
RUN pip install --no-cache-dir --no-deps --editable .

WORKDIR /shared
CMD ["deepnarrow", "--version"]
