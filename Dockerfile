# The service in a container: read-only, not root, nothing secret in its layers. docs/service.md says how to run it.
#   docker build --tag stable-diffusion-toolkit:cpu .
#   docker build --tag stable-diffusion-toolkit:cuda --build-arg DEVICE=cuda .
ARG PYTHON=3.11-slim-bookworm

FROM python:${PYTHON} AS system
ARG DEVICE=cpu
# OpenCV, which writes the watermark, needs the first two; Triton compiles the launchers of its kernels.
# hadolint ignore=DL3008
RUN case "$DEVICE" in \
      cpu | cuda) ;; \
      *) echo "--build-arg DEVICE=$DEVICE: give cpu or cuda" >&2; exit 2 ;; \
    esac \
 && apt-get update \
 && apt-get install --yes --no-install-recommends libgl1 libglib2.0-0 \
 && if [ "$DEVICE" = cuda ]; then apt-get install --yes --no-install-recommends gcc libc6-dev; fi \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 10001 service \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /cache --shell /usr/sbin/nologin service \
 && install --directory --owner 10001 --group 10001 /cache /outputs

FROM python:${PYTHON} AS packages
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /app
# What decides the packages comes alone: a change of the code, or of the device, does not install them anew.
COPY setup.py constraints.txt ./
COPY ldm/__init__.py ldm/
# The usual wheel of torch brings the CUDA libraries along, 5 GB of them, for which a CPU has no use:
# --build-arg INDEX=… names an index of wheels for CPUs, as PyTorch's page on installing has it.
ARG INDEX=
# The toolkit itself is only pointed at, in /app, where the last stage puts it.
RUN python -m venv /opt/venv \
 && /opt/venv/bin/pip install ${INDEX:+--extra-index-url "$INDEX"} --constraint constraints.txt \
      --editable ".[service,provenance]"

FROM system
COPY --from=packages /opt/venv /opt/venv
WORKDIR /app
COPY LICENSE setup.py ./
COPY configs configs
COPY models models
COPY scripts scripts
COPY ldm ldm
# A checkout under a strict umask has files which only their owner may read.
RUN find . ! -perm -a=r -exec chmod a+rX {} + \
 && /opt/venv/bin/python -m compileall -q ldm scripts
# Measured and compiled kernels are kept in /cache, the one place besides /tmp that has to be writable. With an
# arena for each thread, glibc would keep the memory of images that many threads have decoded.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    HF_HUB_OFFLINE=1 \
    MALLOC_ARENA_MAX=2 \
    HOME=/cache \
    XDG_CACHE_HOME=/cache \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=10s --start-period=180s --retries=3 \
  CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=8)"]
# Further options of the service follow the image's name; one that is given again is the last word.
ENTRYPOINT ["python", "scripts/serve.py", "--host", "0.0.0.0", "--port", "8000", "--token_file", "/run/secrets/tokens"]
