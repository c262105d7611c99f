"""What docs/deploy/ has for Prometheus and Grafana: the rules fire when they should, and only then."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client import generate_latest

import zpgpool
from conftest import ROOT
from conftest import run
from test_proxies import find
from zpgpool.core import lag
from zpgpool.core.lag import watch
from zpgpool.metrics import PoolCollector


pytestmark = pytest.mark.usefixtures("measured")

RULES = ROOT / "docs" / "deploy" / "alerts.yml"
DASHBOARD = ROOT / "docs" / "deploy" / "grafana.json"

#: Of each alert: a series of ours (every 15 s, for ten minutes) that fires it, and one that does not.
SERIES = {
    "PoolRequestsWait": ("db_client_connection_pending_requests", "0 3x40", "0 3 0 2 0x40"),
    "PoolRequestsFail": ("zpgpool_requests_errors_total", "7x30 8x10", "7x40"),
    "PoolNearlyFull": ('db_client_connection_count{state="used"}', "8x40", "8x20 3x20"),
    "PoolConnectsFail": ("zpgpool_connections_errors_total", "0x20 0+1x20", "5x40"),
    "PoolWaitsLong": ("db_client_connection_wait_time_seconds_bucket", "0+1x40", "0+10x40"),
    "ReplicaBehind": ("zpgpool_replica_lag_seconds", "2 40x40", "40x4 2x36"),
}


def with_labels(name: str, **labels: str) -> str:
    """Return a series: a name that may have labels already, and those of a pool."""
    name, _, own = name.partition("{")
    pairs = [own.rstrip("}")] if own else []
    return f"{name}{{{','.join([*pairs, *(f'{key}={json.dumps(value)}' for key, value in labels.items())])}}}"


def series(alert: str, fires: bool) -> list[dict[str, str]]:
    name, bad, good = SERIES[alert]
    values = bad if fires else good
    if name.endswith("_bucket"):  # of those that waited, ten at a time, less than a second, or one
        return [
            {"series": with_labels(name, pool_name="main", le="1.0"), "values": values},
            {"series": with_labels(name, pool_name="main", le="5.0"), "values": "0+10x40"},
            {"series": with_labels(name, pool_name="main", le="+Inf"), "values": "0+10x40"},
        ]
    found = [{"series": with_labels(name, pool_name="main"), "values": values}]
    if "count{" in name:
        found.append({"series": with_labels("db_client_connection_max", pool_name="main"), "values": "8x40"})
    return found


def promtool(*args: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([find("promtool", "prometheus"), *args], capture_output=True, text=True, check=False)


def test_every_alert_is_tested() -> None:
    assert re.findall(r"- alert: (\w+)", RULES.read_text()) == list(SERIES)


@pytest.mark.parametrize("fires", [True, False])
@pytest.mark.parametrize("alert", list(SERIES))
def test_an_alert_fires_when_it_should(tmp_path: Path, alert: str, fires: bool) -> None:
    severity = re.findall(rf"alert: {alert}\n.*?severity: (\w+)", RULES.read_text(), re.DOTALL)[0]
    labels = f'{{alertname="{alert}", alertstate="firing", pool_name="main", severity="{severity}"}}'
    query = {
        "expr": f'ALERTS{{alertname="{alert}", alertstate="firing"}}',
        "eval_time": "9m",
        "exp_samples": [{"labels": f"ALERTS{labels}", "value": 1}] if fires else [],
    }
    tests = {
        "rule_files": [str(RULES)],
        "evaluation_interval": "15s",
        "tests": [{"interval": "15s", "input_series": series(alert, fires), "promql_expr_test": [query]}],
    }
    (path := tmp_path / "tests.yml").write_text(json.dumps(tests))  # which is YAML, too
    result = promtool("test", "rules", path)
    assert result.returncode == 0, result.stdout + result.stderr


def test_rules_and_panels_are_over_metrics_that_there_are(
    make_pool: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = make_pool(name="main")
    zpgpool.register_pool(pool, "main")
    run(conn := pool.getconn(), "SELECT 1")
    pool.putconn(conn)
    # As if its server were a standby: the lag is a metric, too.
    monkeypatch.setattr(lag, "query", lambda *args: ([(True, True, None)], 0))
    watch(pool).look()
    registry = CollectorRegistry()
    registry.register(PoolCollector())
    there = set(re.findall(r"^([a-z_]+)\{[^}]*pool_name=\"main\"", generate_latest(registry).decode(), re.MULTILINE))
    panels = json.loads(DASHBOARD.read_text())["panels"]
    shown = [target["expr"].replace("$pool", "main") for panel in panels for target in panel["targets"]]
    asked = [*shown, *re.findall(r"expr: (.*)", RULES.read_text())]
    for expr in asked:
        names = re.findall(r"\b(?:db_client|zpgpool)_\w+", expr)
        assert names
        assert set(names) <= there, expr
    # What a panel asks is a rule's expression: promtool says whether Prometheus understands it.
    rules = [{"record": f"panel:{number}", "expr": expr} for number, expr in enumerate(shown)]
    (path := tmp_path / "panels.yml").write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    for each in (RULES, path):
        result = promtool("check", "rules", each)
        assert result.returncode == 0, result.stdout + result.stderr
