# Two images from one uv.lock: `airflow`, the services of Airflow (no torch, no pipeline), and `pipeline`, which adds all
# else: workers, MLflow, exporter, bridge. `make compose-images` builds both; docs/operations.md says more.
# The code comes from a bundle of the commit, so that no file that was not committed is in an image.
ARG BASE=python:3.11-slim-bookworm

FROM ${BASE} AS uv
RUN python -m venv /opt/uv && /opt/uv/bin/pip install --no-cache-dir --quiet uv==0.13.8

FROM ${BASE} AS code
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends git && rm -rf /var/lib/apt/lists/*
COPY deploy/project.bundle /tmp/project.bundle
RUN git clone --quiet /tmp/project.bundle /opt/ballast && git -C /opt/ballast remote remove origin

FROM ${BASE} AS airflow-locked
ENV PATH=/opt/venv/bin:$PATH \
    VIRTUAL_ENV=/opt/venv \
    UV_PROJECT_ENVIRONMENT=/opt/venv \
    UV_PYTHON_DOWNLOADS=never \
    UV_LINK_MODE=copy \
    UV_COMPILE_BYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    AIRFLOW_HOME=/opt/airflow \
    AIRFLOW__CORE__DAGS_FOLDER=/opt/ballast/dags \
    AIRFLOW__CORE__PLUGINS_FOLDER=/opt/ballast/plugins \
    AIRFLOW__CORE__LOAD_EXAMPLES=False \
    AIRFLOW__LOGGING__BASE_LOG_FOLDER=/var/log/airflow \
    AIRFLOW__LOGGING__DAG_PROCESSOR_CHILD_PROCESS_LOG_DIRECTORY=/var/log/airflow/dag_processor \
    BALLAST_VAR=/var/lib/ballast \
    DO_NOT_TRACK=1 \
    DVC_NO_ANALYTICS=1 \
    GX_ANALYTICS_ENABLED=false \
    MLFLOW_DISABLE_TELEMETRY=true
WORKDIR /opt/ballast
# Volumes take their owner from these folders. An empty airflow.cfg: Airflow would write one with today's defaults.
RUN useradd --uid 10001 --create-home ballast && \
    install -d -o ballast -g ballast /opt/airflow /opt/ballast /project /var/lib/ballast /var/log/airflow \
        /var/lib/bridge/own /var/lib/bridge/shown && \
    install -o ballast -g ballast -m 644 /dev/null /opt/airflow/airflow.cfg
RUN --mount=type=bind,from=uv,source=/opt/uv,target=/opt/uv \
    --mount=type=bind,source=pyproject.toml,target=/opt/ballast/pyproject.toml \
    --mount=type=bind,source=uv.lock,target=/opt/ballast/uv.lock \
    --mount=type=cache,target=/root/.cache/uv \
    /opt/uv/bin/uv sync --frozen --only-group airflow

FROM airflow-locked AS airflow
COPY --from=code /opt/ballast/dags dags
COPY --from=code /opt/ballast/plugins plugins
COPY --from=code /opt/ballast/deploy deploy
RUN python -m compileall -q dags plugins deploy
USER 10001
HEALTHCHECK --interval=15s --timeout=10s --start-period=180s --retries=4 CMD ["python", "/opt/ballast/deploy/healthy.py"]
CMD ["airflow", "version"]
ARG COMMIT=unknown
LABEL org.opencontainers.image.title="ballast-airflow" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${COMMIT}"

FROM airflow-locked AS pipeline-locked
# Empty: torch as it is locked, which brings CUDA. An index of CPU wheels, such as PyTorch's own, takes 4 GB less.
ARG TORCH_INDEX=
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends git && rm -rf /var/lib/apt/lists/*
COPY deploy/install.sh /tmp/install.sh
RUN --mount=type=bind,from=uv,source=/opt/uv,target=/opt/uv \
    --mount=type=bind,source=pyproject.toml,target=/opt/ballast/pyproject.toml \
    --mount=type=bind,source=uv.lock,target=/opt/ballast/uv.lock \
    --mount=type=cache,target=/root/.cache/uv \
    sh /tmp/install.sh "${TORCH_INDEX}"

FROM pipeline-locked AS pipeline
# The checkout itself: runs clone it, and the volume of that name begins as a copy of it.
COPY --from=code --chown=ballast:ballast /opt/ballast /opt/ballast
USER 10001
RUN python -m compileall -q pipelines dags plugins deploy
HEALTHCHECK --interval=15s --timeout=10s --start-period=180s --retries=4 CMD ["python", "/opt/ballast/deploy/healthy.py"]
CMD ["ballast", "--help"]
ARG COMMIT=unknown
LABEL org.opencontainers.image.title="ballast-pipeline" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.revision="${COMMIT}"
