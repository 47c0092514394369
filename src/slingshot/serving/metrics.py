"""What a server does, for Prometheus: GET /metrics.

    meter = gateway.metrics.meters["tiny"]
    meter.grew(tokens=1, gap=0.02); meter.ended(usage, cost, queued, first_token)
    gateway.metrics.text()

Every gateway has a registry of its own. Nothing here names a key or holds a word of what was asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import prometheus_client as prometheus
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from slingshot.serving.ledger import Usage
from slingshot.serving.load import WaitingRoom
from slingshot.serving.prices import PICO
from slingshot.serving.served_model import ServedModel

_SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300]
_TOKENS = [4**power for power in range(1, 10)]
_DOLLARS = [10**power for power in range(-6, 3)]
_HISTOGRAMS = {
    "queue_seconds": ("From a request's arrival until the engine takes its prompt on", _SECONDS),
    "first_token_seconds": ("From a request's arrival to its first token", _SECONDS),
    "between_tokens_seconds": ("From one token to the next; those that come together count once", _SECONDS),
    "prompt_tokens": ("Tokens of a prompt", _TOKENS),
    "completion_tokens": ("Tokens of a request's answers, reasoning included", _TOKENS),
    "cost_dollars": ("What a request cost its key", _DOLLARS),
}

# Of the engines of this process: a field of EngineCounters, its name here, and what it is.
_ENGINE = [
    ("drafted", CounterMetricFamily, "draft_tokens", "Tokens guessed ahead"),
    ("accepted", CounterMetricFamily, "accepted_draft_tokens", "Tokens guessed ahead that turned out right"),
    ("preemptions", CounterMetricFamily, "preemptions", "Answers that had to give up their pages for a while"),
    ("running", GaugeMetricFamily, "engine_running", "Sequences in the engine's batch"),
    ("waiting", GaugeMetricFamily, "engine_waiting", "Sequences that wait for a place in it"),
    ("pages_used", GaugeMetricFamily, "pages_used", "Pages of the cache that sequences hold"),
    ("pages_kept", GaugeMetricFamily, "pages_kept", "Pages of the cache kept for a later prompt"),
    ("pages", GaugeMetricFamily, "pages", "Pages of the cache in all"),
]


class ModelMeter:
    """Of one model. generated: tokens that came, of answers on their way too."""

    def __init__(self, name: str, histograms: dict[str, prometheus.Histogram], cached: prometheus.Counter) -> None:
        self._histograms = {key: histogram.labels(name) for key, histogram in histograms.items()}
        self._between = self._histograms["between_tokens_seconds"]
        self._cached = cached.labels(name)
        self.generated = 0

    def grew(self, tokens: int, gap: float | None) -> None:
        """A sample did, `gap` seconds after it did before; None: these are its first."""
        self.generated += tokens
        if gap is not None:
            self._between.observe(gap)

    def ended(self, usage: Usage, cost: int, queued: float | None, first_token: float | None) -> None:
        """A request did. cost: picodollars; queued, first_token: seconds, None where it did not come so far."""
        found = {
            "queue_seconds": queued,
            "first_token_seconds": first_token,
            "prompt_tokens": usage.prompt,
            "completion_tokens": usage.completion,
            "cost_dollars": cost / PICO,
        }
        for name, value in found.items():
            if value is not None:
                self._histograms[name].observe(value)
        self._cached.inc(usage.cached)


class Watched(Protocol):
    """What is read of a gateway, which imports this file."""

    models: dict[str, ServedModel]

    @property
    def waiting(self) -> Mapping[str, WaitingRoom]: ...

    @property
    def running_models(self) -> Sequence[str]: ...


class Metrics:
    """Of a gateway; meters by the names of its models."""

    def __init__(self, gateway: Watched) -> None:
        self._registry = prometheus.CollectorRegistry()
        histograms = {
            name: prometheus.Histogram(f"slingshot_{name}", told, ["model"], buckets=buckets, registry=self._registry)
            for name, (told, buckets) in _HISTOGRAMS.items()
        }
        told = "Tokens of prompts that were found in the cache"
        cached = prometheus.Counter("slingshot_cached_tokens", told, ["model"], registry=self._registry)
        told = "Requests that ended; status 499: the client left"
        self._requests = prometheus.Counter("slingshot_requests", told, ["model", "status"], registry=self._registry)
        self.meters = {name: ModelMeter(name, histograms, cached) for name in gateway.models}
        self._registry.register(_Standing(gateway, self.meters))

    def answered(self, model: str, status: int) -> None:
        """model: "" where the request came to none."""
        self._requests.labels(model, str(status)).inc()

    def text(self) -> bytes:
        return prometheus.generate_latest(self._registry)


class _Standing(Collector):
    """What is read when it is asked for."""

    def __init__(self, gateway: Watched, meters: dict[str, ModelMeter]) -> None:
        self._gateway, self._meters = gateway, meters

    def collect(self) -> Iterator[Metric]:
        gateway = self._gateway
        running = Counter(gateway.running_models)
        generated = CounterMetricFamily("slingshot_generated_tokens", "Tokens generated so far", labels=["model"])
        under_way = GaugeMetricFamily("slingshot_requests_running", "Requests on their way", labels=["model"])
        waiting = GaugeMetricFamily("slingshot_waiting_tokens", "Tokens of prompts that wait", labels=["model"])
        for name, meter in self._meters.items():
            generated.add_metric([name], meter.generated)
            under_way.add_metric([name], running[name])
            waiting.add_metric([name], gateway.waiting[name].tokens)
        yield from (generated, under_way, waiting)
        engines = {name: its for name, model in gateway.models.items() if (its := model.backend.counters) is not None}
        for field, kind, name, told in _ENGINE:
            family = kind(f"slingshot_{name}", told, labels=["model"])
            for model, counters in engines.items():
                family.add_metric([model], getattr(counters, field))
            yield family
