# streammerge as a container.
#
#   docker build -t streammerge .
#   docker run -v ./streammerge.yaml:/etc/streammerge/streammerge.yaml:ro -v models:/models:ro \
#              -v store:/var/lib/streammerge -p 127.0.0.1:9478:9478 --read-only --tmpfs /tmp --stop-timeout 300 \
#              streammerge
#
# In the configuration: `store: /var/lib/streammerge/store`, and `http: {listen: "0.0.0.0:9478"}` to be reached from
# outside. The image writes to the store and to /tmp only, so the rest may be read-only, as above.
#
# The base image is pinned by tag and not by digest: the digest was not known where this file was written. To pin it,
# append the @sha256:... that `docker buildx imagetools inspect python:3.11.14-slim-bookworm` prints, in both places.

FROM python:3.11.14-slim-bookworm AS build

# A further index for pip, empty by default. torch comes as the index in use builds it, and the usual one gives the
# CUDA build, several GB larger. With PyTorch's CPU index here, the same version without CUDA is preferred.
ARG PIP_EXTRA_INDEX_URL=""
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /src
RUN python -m venv /opt/streammerge
# The largest part first and by itself, so that a change of code does not fetch it again.
COPY constraints.txt ./
RUN /opt/streammerge/bin/pip install -c constraints.txt torch
COPY pyproject.toml README.md LICENSE ./
COPY streammerge ./streammerge
RUN /opt/streammerge/bin/pip install -c constraints.txt .

FROM python:3.11.14-slim-bookworm

# A fixed number, so that the owner of the store is the same whatever the image is built on; no login, no home. Others
# may pass through the folder and list nothing: a serving container mounts it and reads snapshots, not the ledger.
RUN groupadd --gid 10001 streammerge \
    && useradd --uid 10001 --gid 10001 --home-dir /nonexistent --no-create-home --shell /usr/sbin/nologin streammerge \
    && install -d -o 10001 -g 10001 -m 0711 /var/lib/streammerge

COPY --from=build /opt/streammerge /opt/streammerge

# Commands in the container find the configuration without -c; caches go where writing is allowed.
ENV PATH=/opt/streammerge/bin:$PATH \
    STREAMMERGE_CONFIG=/etc/streammerge/streammerge.yaml \
    XDG_CACHE_HOME=/tmp/cache

USER 10001:10001
WORKDIR /var/lib/streammerge
# The store outlives the container.
VOLUME ["/var/lib/streammerge"]
EXPOSE 9478

# As in the systemd unit: SIGTERM drains. `docker stop` kills after ten seconds unless it is told to wait longer.
STOPSIGNAL SIGTERM
# The first start hashes the base and seals version 0, hence the long start period.
HEALTHCHECK --interval=30s --timeout=10s --start-period=10m --retries=3 CMD ["streammerge", "healthcheck"]
ENTRYPOINT ["streammerge"]
CMD ["run"]
