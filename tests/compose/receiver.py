"""An OTLP/HTTP receiver in the place of Prometheus' own, for a Prometheus that is built without, as Debian's is.

It takes what Prometheus 3.5 takes at the same address, and answers ``GET /`` with what came: of each service, the
metrics by the names that Prometheus gives them, each with its labels.
"""

import gzip
import json
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.metrics.v1.metrics_pb2 import AggregationTemporality, Metric

PATH = "/api/v1/otlp/v1/metrics"
seen: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))


def name(metric: Metric) -> str:
    """As Prometheus translates it: https://prometheus.io/docs/guides/opentelemetry/."""
    unit = {"ms": "_milliseconds", "": ""}[metric.unit]
    kind = metric.WhichOneof("data")
    assert kind == "gauge" or getattr(metric, kind).aggregation_temporality == (
        AggregationTemporality.AGGREGATION_TEMPORALITY_CUMULATIVE
    ), f"Prometheus takes no deltas: {metric.name}"
    total = "_total" if kind == "sum" and metric.sum.is_monotonic else ""
    return "".join(sign if sign.isalnum() else "_" for sign in metric.name) + unit + total


def keep(request: ExportMetricsServiceRequest) -> None:
    """Note what a request brings."""
    for resource in request.resource_metrics:
        about = {one.key: one.value.string_value for one in resource.resource.attributes}
        for metric in (metric for scope in resource.scope_metrics for metric in scope.metrics):
            points = getattr(metric, metric.WhichOneof("data")).data_points
            labels = seen[about["service.name"]][name(metric)]
            labels.update(one.key for point in points for one in point.attributes)


class Handler(BaseHTTPRequestHandler):
    """Takes metrics, and tells of them."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path != PATH or self.headers["Content-Type"] != "application/x-protobuf":
            self.send_error(404)
            return
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        keep(ExportMetricsServiceRequest.FromString(body))
        self._answer(ExportMetricsServiceResponse().SerializeToString(), "application/x-protobuf")

    def do_GET(self) -> None:
        told: Any = {who: {name: sorted(labels) for name, labels in by.items()} for who, by in seen.items()}
        self._answer(json.dumps(told).encode(), "application/json")

    def _answer(self, body: bytes, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


if __name__ == "__main__":
    ThreadingHTTPServer(("0.0.0.0", 9090), Handler).serve_forever()
