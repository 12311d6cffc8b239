"""What `/metrics` tells Prometheus, in names of its conventions: base units, and `_total` for counters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from mixoff.runtime.runtime import Runtime
    from mixoff.serving.worker import Worker

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counts of requests, times of tokens, and at each look the state of worker and runtime."""

    def __init__(self, worker: Worker, runtime: Runtime) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("mixoff_requests", "HTTP requests", ["path", "status"], registry=self.registry)
        times = {"buckets": SECONDS, "registry": self.registry}
        self.first_token = Histogram("mixoff_time_to_first_token_seconds", "From request to first token", **times)
        self.next_token = Histogram("mixoff_inter_token_seconds", "Between two tokens of an answer", **times)
        self.registry.register(_Now(worker, runtime))

    def watch(self, seconds: float, first: bool) -> None:
        """Note the time of a token."""
        (self.first_token if first else self.next_token).observe(seconds)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class Counted:
    """An ASGI middleware that counts requests by endpoint and status."""

    def __init__(self, app: Any, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass on a request, and note the status of its reply."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def noting(message: Any) -> None:
            if message["type"] == "http.response.start":
                path = getattr(scope.get("route"), "path", "other")
                self.metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        await self.app(scope, receive, noting)


class _Now(Collector):
    """The state of worker and runtime when Prometheus asks."""

    def __init__(self, worker: Worker, runtime: Runtime) -> None:
        self.worker, self.runtime = worker, runtime

    def collect(self) -> Iterator[Metric]:
        """Counters and gauges."""
        counts, info = self.worker.counts, self.runtime.info()
        totals = {
            "generated_tokens": ("tokens computed", counts.tokens),
            "prompt_tokens": ("tokens of prompts", counts.prompt_tokens),
            "passes": ("passes over a batch", counts.steps),
            "failed_passes": ("passes that ended in an error", counts.failures),
            "expert_hits": ("requests of decoding found in the fast tier", info.hits),
            "expert_misses": ("requests of decoding not found there", info.misses),
            "expert_bytes_moved": ("bytes moved into the fast tier", info.bytes_moved),
        }
        for name, (text, value) in totals.items():
            yield CounterMetricFamily(f"mixoff_{name}", text, value)
        now: dict[str, tuple[str, float]] = {
            "rows_running": ("answers being computed", self.worker.running),
            "rows_waiting": ("answers in the queue", self.worker.waiting),
            "tokens_per_second": ("tokens per second lately", counts.tokens_per_s()),
            "expert_hit_ratio": ("share of hits while decoding", info.hit_rate or 0.0),
            "expert_slots": ("slots of the fast tier", info.capacity),
            "experts_resident": ("slots that hold an expert", info.resident),
            "fast_tier_bytes": ("bytes allocated for the fast tier", info.fast_bytes_peak),
        }
        for name, (text, state) in now.items():
            yield GaugeMetricFamily(f"mixoff_{name}", text, state)
