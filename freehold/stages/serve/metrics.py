"""What /metrics reports, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from freehold.guard.policy import Counts


class Metrics:
    """Counts and times of one server; one registry each."""

    def __init__(self, waiting: Callable[[], float], backend: Callable[[], Mapping[str, float]], guard: Counts) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "freehold_requests", "Requests answered", ["route", "status"], registry=self.registry
        )  # fmt: skip
        self.prompt_tokens = Counter("freehold_prompt_tokens", "Prompt tokens read", registry=self.registry)
        self.generated_tokens = Counter("freehold_generated_tokens", "Tokens generated", registry=self.registry)
        self.seconds = Histogram("freehold_request_seconds", "Seconds until the last byte", registry=self.registry)
        self.first_token_s = Histogram(
            "freehold_first_token_seconds", "Seconds until the first token", registry=self.registry
        )
        gauge = Gauge("freehold_waiting_requests", "Requests that have not begun", registry=self.registry)
        gauge.set_function(waiting)
        self.registry.register(_Backend(backend))
        self.registry.register(_Guard(guard))


class _Backend(Collector):
    """What the model's engine counts, read when someone asks."""

    def __init__(self, stats: Callable[[], Mapping[str, float]]) -> None:
        self.stats = stats

    def collect(self) -> Iterator[Metric]:
        """Yield its numbers; those that end with `_total` only grow."""
        for name, value in self.stats().items():
            kind = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            yield kind(f"freehold_{name}", "Of the engine; see docs/serving.md", value=value)


class _Guard(Collector):
    """What the guardrails found, and how long they took."""

    def __init__(self, counts: Counts) -> None:
        self.counts = counts

    def collect(self) -> Iterator[Metric]:
        """Yield findings by rule, action and place, then the judgements."""
        labels = ["rule", "action", "place"]
        found = CounterMetricFamily("freehold_guard_findings_total", "Texts with findings", labels=labels)
        for names, count in sorted(self.counts.found.items()):
            found.add_metric(names, count)
        yield found
        yield CounterMetricFamily("freehold_guard_judged_total", "Texts judged", value=self.counts.judged)
        yield CounterMetricFamily("freehold_guard_seconds_total", "Seconds spent on it", value=self.counts.seconds)
        yield CounterMetricFamily("freehold_guard_slow_total", "Judgements over budget", value=self.counts.over_budget)


class CountRequests:
    """Counts answers by route and status, without touching what flows."""

    def __init__(self, app: ASGIApp, counter: Counter) -> None:
        self.app, self.counter = app, counter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request on."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        status = "500"

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            await self.app(scope, receive, noting)
        finally:
            self.counter.labels(getattr(scope.get("route"), "path", "other"), status).inc()
