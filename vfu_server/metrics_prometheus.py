"""The reports of all devices in Prometheus' text format. The only place that needs the package prometheus_client.

It must not know how a scrape comes in. Names and labels are documented in docs/operators/metrics.md and stay.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from vfu_server import __version__
from vfu_server.metrics import DeviceReport, mistakes
from vfu_server.server_stage import Stage
from vfu_server.session_counts import SessionStatistics
from vfu_server.uapi import MigState

PREFIX = "vfu_server_"

Samples = Iterable[tuple[Sequence[str], float]]
"""Values of the labels behind `device`, and the sample."""


@dataclass(frozen=True, slots=True)
class Series:
    """One metric: its name without PREFIX (a counter's ends in `_total`), its labels behind `device`, what it tells."""

    name: str
    labels: Sequence[str]
    text: str
    samples: Callable[[SessionStatistics], Samples]

    @property
    def is_counter(self) -> bool:
        """It only grows; else a gauge."""
        return self.name.endswith("_total")


def _one(value: Callable[[SessionStatistics], float]) -> Callable[[SessionStatistics], Samples]:
    return lambda found: [((), value(found))]


def _accesses(found: SessionStatistics) -> Samples:
    for (answer, state_class, direction), count in found.context.accesses.items():
        yield (state_class.name.lower(), answer.name.lower(), direction), count


def _states(found: SessionStatistics) -> Samples:
    return [((state.name,), float(state is found.state)) for state in MigState]


def _arcs(found: SessionStatistics) -> Samples:
    for arc, times in found.arcs.items():
        yield (arc.source.name, arc.target.name, "done"), times.done
        yield (arc.source.name, arc.target.name, "failed"), times.failed


def _trace(found: SessionStatistics) -> Samples:
    if found.trace is not None:
        yield ("written",), found.trace.written
        yield ("lost",), found.trace.lost


SERIES: tuple[Series, ...] = (
    Series("migration_state", ("state",), "1 for the migration state of the device, 0 for others", _states),
    Series("clients_total", (), "clients that came", _one(lambda found: found.clients)),
    Series("messages_total", (), "messages of clients", _one(lambda found: found.context.messages)),
    Series("replies_total", (), "replies to clients, error replies included", _one(lambda f: f.context.replies)),
    Series("error_replies_total", (), "replies with an errno", _one(lambda found: found.context.errors)),
    Series("client_mistakes_total", (), "mistakes of clients, all kinds; the log names them", _one(mistakes)),
    Series("accesses_total", ("class", "answer", "direction"), "accesses that the policy's table answered", _accesses),
    Series("dma_maps", (), "DMA maps of the client", _one(lambda found: found.host.dma_maps)),
    Series("dma_bytes", (), "bytes of the client's memory that are mapped", _one(lambda found: found.host.dma_bytes)),
    Series("dma_relays_total", (), "DMA of the device that went to the client by message", _one(lambda f: f.relays)),
    Series("door_requests_total", (), "requests to the device's side", _one(lambda found: found.host.requests)),
    Series("door_errors_total", (), "requests that the device's side refused", _one(lambda found: found.host.errors)),
    Series("kernel_slow_calls_total", (), "calls of the kernel that took seconds", _one(lambda f: f.host.slow_calls)),
    Series("migration_arcs_total", ("source", "target", "result"), "arcs of the migration state machine", _arcs),
    Series(
        "migration_arc_seconds_total",
        ("source", "target"),
        "time that arcs took which were gone",
        lambda found: [((arc.source.name, arc.target.name), times.seconds) for arc, times in found.arcs.items()],
    ),
    Series(
        "migration_arc_longest_seconds",
        ("source", "target"),
        "the longest time that an arc took",
        lambda found: [((arc.source.name, arc.target.name), times.longest) for arc, times in found.arcs.items()],
    ),
    Series(
        "migration_bytes_total",
        ("direction",),
        "bytes of device state in data sessions that are over",
        lambda found: [(("saved",), found.bytes_saved), (("loaded",), found.bytes_loaded)],
    ),
    Series("resets_total", (), "resets of the device", _one(lambda found: found.resets)),
    Series("plugin_overruns_total", (), "coroutines of the plugin that did not end", _one(lambda f: f.overruns)),
    Series("trace_accesses_total", ("result",), "accesses for --trace-regions: written, or lost", _trace),
    Series(
        "plugin_statistic",
        ("name",),
        "counters of the plugin's choice",
        lambda found: [((name,), value) for name, value in found.plugin.items()],
    ),
)

INFO: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("build_info", ("version",), "the server; always 1"),
    ("device_info", ("device", "source", "plugin", "plugin_version"), "what is served; always 1"),
    ("device_stage", ("device", "stage"), "1 for the stage that the device is in, 0 for others"),
)
"""The gauges that are told of any device: name, labels, text."""


class DeviceCollector(Collector):
    """Asks for the reports at each scrape."""

    def __init__(self, reports: Callable[[], Sequence[DeviceReport]]) -> None:
        self._reports = reports

    def collect(self) -> Iterator[Metric]:
        """All families."""
        reports = self._reports()
        build, info, stage = (GaugeMetricFamily(PREFIX + name, text, labels=labels) for name, labels, text in INFO)
        build.add_metric([__version__], 1)
        for report in reports:
            info.add_metric([report.name, report.source, report.plugin, report.plugin_version], 1)
            for each in Stage:
                stage.add_metric([report.name, each.value], float(each.value == report.stage))
        yield from (build, info, stage)
        for series in SERIES:
            yield _family(series, reports)


def _family(series: Series, reports: Sequence[DeviceReport]) -> Metric:
    labels = ("device", *series.labels)
    family: CounterMetricFamily | GaugeMetricFamily
    if series.is_counter:
        family = CounterMetricFamily(PREFIX + series.name.removesuffix("_total"), series.text, labels=labels)
    else:
        family = GaugeMetricFamily(PREFIX + series.name, series.text, labels=labels)
    for report in reports:
        if report.statistics is not None:
            for values, sample in series.samples(report.statistics):
                family.add_metric([report.name, *values], sample)
    return family


def renderer(reports: Callable[[], Sequence[DeviceReport]]) -> Callable[[], tuple[str, bytes]]:
    """A function that gives the content type and the text of a scrape."""
    registry = CollectorRegistry()
    registry.register(DeviceCollector(reports))
    return lambda: (CONTENT_TYPE_LATEST, generate_latest(registry))
