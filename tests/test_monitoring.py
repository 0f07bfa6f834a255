"""`/metrics`, and the dashboard and alerts that read it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.held_upstream import MODEL, HeldUpstream
from tests.support.process_box import Box, StartBox

yaml: Any = pytest.importorskip("yaml")
DOCS = Path(__file__).parent.parent / "docs"
FOLDER = DOCS / "monitoring"
GUIDE = (DOCS / "monitoring.md").read_text()
DASHBOARD = json.loads((FOLDER / "grafana.json").read_text())
RULES = yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"][0]["rules"]
FAKE = "fake:1"
# Of Prometheus itself, and those that it puts on all series.
ALWAYS, ON_ALL = {"up"}, {"job", "instance"}
SUFFIXES = ("_bucket", "_sum", "_count", "_total")
FUNCTIONS = {
    *("sum", "rate", "increase", "histogram_quantile", "vector", "time", "by", "or", "ignoring"),
}
UNSAMPLED_ON_A_CPU = {
    *("pinaivu_device_utilisation_ratio", "pinaivu_device_temperature_celsius"),
    "pinaivu_device_power_watts",
}


@pytest.fixture(scope="module")
def upstream() -> Iterator[HeldUpstream]:
    made = HeldUpstream()
    yield made
    made.close()


@pytest.fixture(scope="module")
def box(module_box: StartBox, upstream: HeldUpstream) -> Box:
    """With some traffic: answers, an error, an upstream."""
    config = '[server]\ntls = "self-signed"\n' + upstream.config
    started = module_box("--model", f"{FAKE}=fake:1", config=config)
    for model, tokens, status in ((FAKE, 9, 200), (MODEL, 9, 200), (FAKE, "no number", 422)):
        assert ask(started, model, tokens) == status
    return started


def ask(box: Box, model: str, tokens: Any) -> int:
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": tokens}
    return box.http("POST", "/v1/chat/completions", json=body).status_code


def promtool(*args: str, text: str | None = None) -> str:
    if (program := shutil.which("promtool")) is None:
        pytest.skip("promtool is not installed")
    done = subprocess.run(
        [program, *args], input=text, capture_output=True, text=True, timeout=300, cwd=FOLDER
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def labels_by_metric(box: Box) -> dict[str, set[str]]:
    """The names of the labels of each series, by its name; empty for a metric without series."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(box.http("GET", "/metrics").text):
        found.setdefault(family.name + ("_total" if family.type == "counter" else ""), set())
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


# -- /metrics --------------------------------------------------------------------------------------


def test_promtool_finds_nothing_wrong(box: Box) -> None:
    assert promtool("check", "metrics", text=box.http("GET", "/metrics").text) == ""


def test_names_follow_the_rules(box: Box) -> None:
    for family in text_string_to_metric_families(box.http("GET", "/metrics").text):
        assert re.fullmatch("(pinaivu|process)_[a-z_]+[a-z]", family.name)
        assert family.documentation[:1].isupper() and family.documentation.endswith(".")
        name = family.name
        assert not re.search("_(ms|milliseconds|percent|mb|minutes)$", name), name
        assert not name.endswith("_created"), name


def test_what_was_served_is_counted(box: Box) -> None:
    found = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(box.http("GET", "/metrics").text)
        for sample in family.samples
    }
    for name in ("time_to_first_token_seconds", "queue_seconds", "request_seconds"):
        assert found[f"pinaivu_{name}_count", FAKE] == 1, name
    assert found["pinaivu_time_per_output_token_seconds_count", FAKE] == 1
    assert found["pinaivu_request_completion_tokens_sum", FAKE] == 9
    assert found["pinaivu_request_prompt_tokens_sum", FAKE] > 0
    assert found["pinaivu_store_commit_seconds_count",] > 0
    assert found["pinaivu_store_size_bytes",] > 0 and found["pinaivu_store_writable",] == 1
    assert found["pinaivu_upstream_up", "gpu"] == 1
    assert found["pinaivu_certificate_expiry_timestamp_seconds",] > 1.7e9
    assert found["process_resident_memory_bytes",] > 1e6


def test_clients_cannot_make_series(box: Box) -> None:
    def series() -> set[str]:
        lines = box.http("GET", "/metrics").text.splitlines()
        return {line.rpartition(" ")[0] for line in lines if not line.startswith("#")}

    def misuse(number: int) -> None:
        assert ask(box, f"nosuch:{number}", 1) == 404
        assert box.http(f"M{number}", f"/v1/{number}").status_code >= 400
        assert box.http("GET", f"/v1/{number}", key=f"sk-pnv-{number}").status_code >= 400

    misuse(0)
    before = series()
    for number in range(1, 20):
        misuse(number)
    assert series() == before and not any("nosuch" in line for line in before)


def test_openmetrics_is_for_who_asks_for_it(box: Box) -> None:
    accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
    answer = box.http("GET", "/metrics", headers=accept)
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")
    plain = box.http("GET", "/metrics")
    assert plain.headers["content-type"].startswith("text/plain")


def test_the_guide_lists_every_metric(box: Box) -> None:
    named: set[str] = set()
    for cell in re.findall(r"^\| (`pinaivu_[^|]*) \|", GUIDE, re.MULTILINE):
        first, *more = re.findall("`([a-z_]+)`", cell)
        named |= {first, *more}
        # `_waiting` beside `pinaivu_engine_running` stands for `pinaivu_engine_waiting`.
        stem = re.match("pinaivu_[a-z]+", first)
        assert stem is not None
        named |= {stem[0] + name for name in more if name.startswith("_")}
    for name in labels_by_metric(box):
        base = re.sub("_(bucket|sum|count)$", "", name)
        assert base.startswith("process_") or base in named, base


# -- the files -------------------------------------------------------------------------------------


def queries() -> list[tuple[str, str]]:
    """All of both files, with where each is."""
    found = [(rule["alert"], rule["expr"]) for rule in RULES]
    for panel in DASHBOARD["panels"]:
        found += [(panel["title"], target["expr"]) for target in panel.get("targets", [])]
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            inner = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["definition"])
            assert inner is not None
            found.append((variable["name"], f"sum by ({inner[2]}) ({inner[1]})"))
    return found


def test_every_query_names_metrics_and_labels_that_there_are(box: Box) -> None:
    there = labels_by_metric(box)
    used: set[str] = set()
    for where, query in queries():
        labels: set[str] = set()
        metrics: set[str] = set()
        text = re.sub(r'"[^"]*"', '""', query)
        for group in re.findall(r"\b(?:by|ignoring) \(([^)]*)\)", text):
            labels |= set(re.findall(r"\w+", group))
        text = re.sub(r"\b(?:by|ignoring) \([^)]*\)", "", text)
        for name, _, selector in re.findall(r"\b([a-z_]+)(\{([^}]*)\})?", text):
            if name in FUNCTIONS or not re.match("(pinaivu|process)_|up$", name):
                continue
            metrics.add(name)
            of_it = set(re.findall(r"(\w+)(?==|!=|=~|!~)", selector))
            if name not in ALWAYS | UNSAMPLED_ON_A_CPU:
                assert of_it <= there.get(name, set()) | ON_ALL, (where, name, of_it)
        assert metrics, (where, query)
        for name in metrics - ALWAYS:
            assert name in there, (where, name)
        every = set().union(*(there.get(name, set()) for name in metrics))
        assert labels <= every | ON_ALL, (where, labels)
        used |= metrics
    # And nothing else looks like a metric that was overlooked.
    assert {"pinaivu_time_to_first_token_seconds_bucket", "process_open_fds"} <= used


def test_every_query_is_promql(tmp_path: Path) -> None:
    rules = [
        {"record": f"query:{number}", "expr": query.replace("$__rate_interval", "5m")}
        for number, (_, query) in enumerate(queries())
    ]
    file = tmp_path / "queries.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": rules}]}))
    promtool("check", "rules", str(file))


def test_the_alerts_are_valid_and_do_what_they_say() -> None:
    assert f"{len(RULES)} rules found" in promtool("check", "rules", "alerts.yaml")
    promtool("test", "rules", "alerts_test.yaml")
    tests = yaml.safe_load((FOLDER / "alerts_test.yaml").read_text())["tests"]
    assert [test["name"] for test in tests] == [rule["alert"] for rule in RULES]


def test_every_alert_says_what_to_do() -> None:
    headings = {
        re.sub("[^a-z0-9 -]", "", title.lower()).replace(" ", "-")
        for title in re.findall("^### (.*)$", GUIDE, re.MULTILINE)
    }
    for rule in RULES:
        texts = rule["annotations"]
        assert set(texts) == {"summary", "description", "runbook"}
        page, _, heading = texts["runbook"].partition("#")
        assert (page, heading in headings) == ("docs/monitoring.md", True), texts["runbook"]
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
    assert len(headings) == len(RULES)


def test_the_dashboard_can_be_imported_anywhere() -> None:
    assert DASHBOARD["templating"]["list"][0]["type"] == "datasource"
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken and place["x"] + place["w"] <= 24, panel["title"]
        taken |= cells
        for target in panel.get("targets", []):
            assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
