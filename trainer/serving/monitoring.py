"""The metrics of the server at /metrics, in the format of Prometheus."""

from collections.abc import Callable

import prometheus_client
from starlette.responses import Response

# Seconds. The network takes 0.1 s for an image on a CPU, 0.01 s on a GPU; the default timeout of a request is 60 s.
_LATENCY_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)


class ServerMetrics:
    """Counters, histograms and gauges of one server, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = prometheus_client.CollectorRegistry()
        prometheus_client.ProcessCollector(registry=self._registry)  # memory, CPU time, file descriptors
        self.requests = self._counter("requests", "Answered prediction requests by HTTP status.", ["status"])
        self.request_seconds = self._histogram("request_seconds", "From header to response of a prediction request.")
        self.images = self._counter("images", "Images in answered requests; result is classified or error.", ["result"])
        self.batch_seconds = self._histogram("batch_seconds", "Of one call of the network.")
        self.batch_images = self._histogram("batch_images", "Images in one call of the network.", buckets=range(1, 9))
        self.killed_decoders = self._counter("killed_decoders", "Decoders that took too long or ended.", [])

    def observe(self, name: str, documentation: str, value: Callable[[], float]) -> None:
        """Adds a gauge that is read when the metrics are."""
        gauge = prometheus_client.Gauge(f"trainer_serve_{name}", documentation, registry=self._registry)
        gauge.set_function(value)

    def response(self) -> Response:
        """All metrics as text."""
        text = prometheus_client.generate_latest(self._registry)
        return Response(text, headers={"Content-Type": prometheus_client.CONTENT_TYPE_LATEST})

    def _counter(self, name: str, documentation: str, labels: list[str]) -> prometheus_client.Counter:
        return prometheus_client.Counter(f"trainer_serve_{name}", documentation, labels, registry=self._registry)

    def _histogram(
        self, name: str, documentation: str, buckets: tuple[float, ...] | range = _LATENCY_BUCKETS
    ) -> prometheus_client.Histogram:
        return prometheus_client.Histogram(
            f"trainer_serve_{name}", documentation, buckets=buckets, registry=self._registry
        )
