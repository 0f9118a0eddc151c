# The server in a container.
#
#   docker build --tag cnpp-trt .
#   docker build --tag cnpp-trt:gpu --build-arg DEVICE=gpu .
#
# The image runs without root rights and with a read-only root file system; see docs/deploy.md.

# glibc 2.36 and a Python of 3.11 or newer. The GPU's libraries come from wheels, its driver from the host.
ARG BASE=docker.io/library/python:3.13-slim-bookworm

FROM ${BASE} AS build
# `cpu`, `gpu`, `rtx` or `openvino`, as the extras of pyproject.toml.
ARG DEVICE=cpu
ARG EXTRAS=service,demo,ray
WORKDIR /source
COPY . .
RUN python3 -m venv /opt/cnpp-trt \
    && /opt/cnpp-trt/bin/pip install --no-cache-dir --constraint constraints.txt ".[${DEVICE},${EXTRAS}]"

FROM ${BASE}
COPY --from=build /opt/cnpp-trt /opt/cnpp-trt
ENV PATH=/opt/cnpp-trt/bin:${PATH} \
    CNPP_TRT_HOME=/var/lib/cnpp-trt \
    PYTHONDONTWRITEBYTECODE=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
# What is found out about bundles, plans, and the embedded model: it may go with the container.
RUN mkdir -p /var/lib/cnpp-trt && chown 10001:10001 /var/lib/cnpp-trt
VOLUME ["/var/lib/cnpp-trt", "/bundle"]
USER 10001:10001
WORKDIR /var/lib/cnpp-trt
EXPOSE 8000
# Ready once the first picture is drawn; large models take minutes until then.
HEALTHCHECK --interval=15s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python3", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
ENTRYPOINT ["cnpp-trt"]
CMD ["serve", "--host", "0.0.0.0"]
