"""The pools' numbers for machines that collect them, under OpenTelemetry's names (`db.client.connection.*`).

Prometheus reads them through `PoolCollector` (extra `metrics`), OpenTelemetry after `instrument()` (extra `otel`).
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from importlib.metadata import version
from itertools import accumulate
from typing import Any
from typing import NamedTuple
from typing import TYPE_CHECKING

from zope.interface.registry import Components

from .core import lag_of
from .monitor import begin
from .monitor import BOUNDS
from .monitor import history_of
from .monitor import list_pools


if TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.metrics import Observation
    from prometheus_client.metrics_core import Metric


PREFIX = "db.client.connection."


class Number(NamedTuple):
    """A row of the table: a number of each pool's, or one for each state of its connections."""

    name: str
    unit: str
    help: str
    read: Callable[[Any, dict[str, int]], Any]
    is_counter: bool = False


NUMBERS = (
    Number(
        "count",
        "{connection}",
        "The connections that are in that state",
        lambda pool, stats: {
            "used": max(0, stats["pool_size"] - stats["pool_available"]),
            "idle": stats["pool_available"],
        },
    ),
    Number("max", "{connection}", "The most connections that may be open", lambda pool, stats: stats["pool_max"]),
    Number("idle.min", "{connection}", "The connections that are kept open", lambda pool, stats: stats["pool_min"]),
    Number("pending_requests", "{request}", "Who waits now", lambda pool, stats: stats["requests_waiting"]),
    Number(
        "timeouts",
        "{timeout}",
        "Who waited as long as the timeout allows, and got none",
        lambda pool, stats: history_of(pool).timeouts,
        is_counter=True,
    ),
)

TIMES = {
    "create_time": "How long it took to open a connection",
    "wait_time": "How long those waited who had to wait",
    "use_time": "The time between getting a connection and putting it away",
}

#: The pools' own counters, which the conventions have no names for.
COUNTERS = (
    "requests_num",
    "requests_queued",
    "requests_errors",
    "returns_bad",
    "connections_num",
    "connections_errors",
    "connections_lost",
)


class PoolCollector:
    """A collector for a registry of `prometheus_client`: `CollectorRegistry().register(PoolCollector())`."""

    def __init__(self, registry: Components | None = None) -> None:
        from prometheus_client import metrics_core

        self._core = metrics_core
        self._registry = registry
        begin()

    def describe(self) -> list[Metric]:
        """Return nothing: a registry need not collect in order to know the names."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of all registered pools."""
        pools = [(name, pool, pool.get_stats()) for name, pool in list_pools(self._registry)]
        for number in NUMBERS:
            yield self._number(number, pools)
        for counter in COUNTERS:
            family = self._core.CounterMetricFamily(f"zpgpool_{counter}", f"See get_stats(): {counter}", labels=LABELS)
            for name, _, stats in pools:
                family.add_metric([name], stats[counter])
            yield family
        for time, help in TIMES.items():
            yield self._times(time, help, pools)
        lags = self._core.GaugeMetricFamily(f"{LAG.replace('.', '_')}_seconds", LAG_HELP, labels=LABELS)
        for name, pool, _ in pools:
            if (lag := lag_of(pool)) is not None and lag.seconds is not None:
                lags.add_metric([name], lag.seconds)
        yield lags

    def _number(self, number: Number, pools: Iterable[tuple[str, Any, dict[str, int]]]) -> Metric:
        family = self._core.CounterMetricFamily if number.is_counter else self._core.GaugeMetricFamily
        has_states = number.name == "count"
        metric = family(_underscored(number.name), number.help, labels=[*LABELS, "state"] if has_states else LABELS)
        for name, pool, stats in pools:
            value = number.read(pool, stats)
            for labels, each in [([state], each) for state, each in value.items()] if has_states else [([], value)]:
                metric.add_metric([name, *labels], each)
        return metric

    def _times(self, time: str, help: str, pools: Iterable[tuple[str, Any, dict[str, int]]]) -> Metric:
        metric = self._core.HistogramMetricFamily(f"{_underscored(time)}_seconds", help, labels=LABELS)
        for name, pool, _ in pools:
            counts, total = history_of(pool).times[time].read()
            buckets = zip([*map(str, BOUNDS), "+Inf"], accumulate(counts), strict=True)
            metric.add_metric([name], list(buckets), total)
        return metric


LABELS = ["pool_name"]

#: Of a replica's pool, while it is known.
LAG = "zpgpool.replica.lag"
LAG_HELP = "How far the replica is behind the primary"


def _underscored(name: str) -> str:
    return f"{PREFIX}{name}".replace(".", "_")


def instrument(meter_provider: MeterProvider | None = None, registry: Components | None = None) -> None:
    """Have OpenTelemetry collect the numbers of all registered pools, with `meter_provider` or the global one."""
    from opentelemetry.metrics import get_meter
    from opentelemetry.metrics import Observation

    meter = get_meter("zpgpool", version("zpgpool"), meter_provider)
    begin(exporter=meter)
    histograms = {
        name: meter.create_histogram(
            f"{PREFIX}{name}", unit="s", description=help, explicit_bucket_boundaries_advisory=list(BOUNDS)
        )
        for name, help in TIMES.items()
    }

    def observe(number: Number) -> Callable[[CallbackOptions], Iterator[Observation]]:
        def callback(options: CallbackOptions) -> Iterator[Observation]:
            for name, pool in list_pools(registry):
                attributes = {f"{PREFIX}pool.name": name}
                # Here, and not when they are measured: that may be in the middle of the garbage collector.
                for time, seconds in history_of(pool).drain():
                    histograms[time].record(seconds, attributes)
                value = number.read(pool, pool.get_stats())
                for state, each in value.items() if isinstance(value, dict) else [(None, value)]:
                    yield Observation(each, {**attributes, f"{PREFIX}state": state} if state else attributes)

        return callback

    for number in NUMBERS:
        create = meter.create_observable_counter if number.is_counter else meter.create_observable_up_down_counter
        create(f"{PREFIX}{number.name}", [observe(number)], number.unit, number.help)

    def observe_lag(options: CallbackOptions) -> Iterator[Observation]:
        for name, pool in list_pools(registry):
            if (lag := lag_of(pool)) is not None and lag.seconds is not None:
                yield Observation(lag.seconds, {f"{PREFIX}pool.name": name})

    meter.create_observable_gauge(LAG, [observe_lag], "s", LAG_HELP)
