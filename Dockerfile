# Freehold in a container. The image holds the package, its recipes and a compiler for the CPU kernels; text and runs
# live in the volume /data.
#
#   docker build -t freehold .
#   docker build -t freehold --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .    # an NVIDIA GPU
#   docker run --rm -v "$PWD":/data freehold freehold run laptop --dry-run
#
# Debian 12 has Python 3.11, which constraints.txt is made for.
FROM debian:bookworm-slim

# Where the build of PyTorch comes from; everything else comes from PyPI.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

ENV PATH=/opt/freehold/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1

RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates g++ python3 python3-venv \
    && rm -rf /var/lib/apt/lists/*

RUN python3 -m venv /opt/freehold

WORKDIR /src

# PyTorch first: this layer stays when the code changes. A local version (2.13.0+cpu, +cu130) sorts above PyPI's own.
COPY constraints.txt ./
RUN pip install --extra-index-url "$TORCH_INDEX" --constraint constraints.txt torch

COPY pyproject.toml README.md LICENSE ./
COPY recipes recipes
COPY freehold freehold
RUN pip install --constraint constraints.txt ".[export]"

RUN useradd --create-home --uid 1000 freehold && install --directory --owner=freehold /data
USER freehold
WORKDIR /data

CMD ["freehold", "--help"]
