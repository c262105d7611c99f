"""The pools' numbers for machines that collect them, under OpenTelemetry's names (`db.client.connection.*`).

Prometheus reads them through `PoolCollector` (extra `metrics`), OpenTelemetry after `instrument()` (extra `otel`).
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from importlib.metadata import version
from itertools import accumulate
from typing import NamedTuple
from typing import TYPE_CHECKING

from zope.interface.registry import Components

from .core import lag_of
from .monitor import begin
from .monitor import BOUNDS
from .monitor import COUNTERS
from .monitor import history_of
from .monitor import list_pools
from .monitor import read
from .monitor import Reading
from .monitor import Share


if TYPE_CHECKING:
    from opentelemetry.metrics import CallbackOptions
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.metrics import Observation
    from prometheus_client.metrics_core import Metric


PREFIX = "db.client.connection."


class Number(NamedTuple):
    """A row of the table: a number of each pool's under "", or one for each state of its connections under its name."""

    name: str
    unit: str
    help: str
    read: Callable[[Reading], dict[str, float]]
    is_counter: bool = False


def _gauge(name: str) -> Callable[[Reading], dict[str, float]]:
    return lambda reading: {"": reading["gauges"].get(name, 0)}  # none of a pool that only ended processes had


NUMBERS = (
    Number(
        "count",
        "{connection}",
        "The connections that are in that state",
        lambda reading: {state: reading["gauges"].get(state, 0) for state in ("used", "idle")},
    ),
    Number("max", "{connection}", "The most connections that may be open", _gauge("max")),
    Number("idle.min", "{connection}", "The connections that are kept open", _gauge("idle.min")),
    Number("pending_requests", "{request}", "The requests that wait now", _gauge("pending_requests")),
    Number(
        "timeouts",
        "{timeout}",
        "The requests that waited for the whole timeout and got no connection",
        lambda reading: {"": reading["counters"].get("timeouts", 0)},
        is_counter=True,
    ),
)

TIMES = {
    "create_time": "How long it took to open a connection",
    "wait_time": "How long a request that had to wait did so",
    "use_time": "The time between getting a connection and putting it away",
}


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
        pools = self._read()
        for number in NUMBERS:
            yield self._number(number, pools)
        for counter in COUNTERS:
            family = self._core.CounterMetricFamily(f"zpgpool_{counter}", f"See get_stats(): {counter}", labels=LABELS)
            for name, reading in pools:
                family.add_metric([name], reading["counters"].get(counter, 0))
            yield family
        for time, help in TIMES.items():
            yield self._times(time, help, pools)
        lags = self._core.GaugeMetricFamily(f"{LAG.replace('.', '_')}_seconds", LAG_HELP, labels=LABELS)
        for name, reading in pools:
            if "lag" in reading["gauges"]:
                lags.add_metric([name], reading["gauges"]["lag"])
        yield lags

    def _read(self) -> list[tuple[str, Reading]]:
        return [(name, read(pool)) for name, pool in list_pools(self._registry)]

    def _number(self, number: Number, pools: Iterable[tuple[str, Reading]]) -> Metric:
        family = self._core.CounterMetricFamily if number.is_counter else self._core.GaugeMetricFamily
        has_states = number.name == "count"
        metric = family(_underscored(number.name), number.help, labels=[*LABELS, "state"] if has_states else LABELS)
        for name, reading in pools:
            for state, value in number.read(reading).items():
                metric.add_metric([name, state] if state else [name], value)
        return metric

    def _times(self, time: str, help: str, pools: Iterable[tuple[str, Reading]]) -> Metric:
        metric = self._core.HistogramMetricFamily(f"{_underscored(time)}_seconds", help, labels=LABELS)
        for name, reading in pools:
            counts, total = reading["times"].get(time, ([0] * (len(BOUNDS) + 1), 0.0))
            buckets = zip([*map(str, BOUNDS), "+Inf"], accumulate(counts), strict=True)
            metric.add_metric([name], list(buckets), total)
        return metric


class SiteCollector(PoolCollector):
    """The same of a site of several processes, which share a folder."""

    def __init__(self, share: Share) -> None:
        super().__init__()
        self._share = share

    def _read(self) -> list[tuple[str, Reading]]:
        return sorted(self._share.numbers().items())


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
                for state, value in number.read(read(pool)).items():
                    yield Observation(value, {**attributes, f"{PREFIX}state": state} if state else attributes)

        return callback

    for number in NUMBERS:
        create = meter.create_observable_counter if number.is_counter else meter.create_observable_up_down_counter
        create(f"{PREFIX}{number.name}", [observe(number)], number.unit, number.help)

    def observe_lag(options: CallbackOptions) -> Iterator[Observation]:
        for name, pool in list_pools(registry):
            if (lag := lag_of(pool)) is not None and lag.seconds is not None:
                yield Observation(lag.seconds, {f"{PREFIX}pool.name": name})

    meter.create_observable_gauge(LAG, [observe_lag], "s", LAG_HELP)
