"""What lies in `runtime/server/deploy` fits the server: options, routes, times, metrics."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from edje.runtime.cli.app import app
from edje.runtime.server.limits import ServiceOptions
from running_server import Running, running, settings_of

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "runtime" / "server" / "deploy"
DOCKERFILES = ("Dockerfile", "Dockerfile.gpu")
FREE_S = 10  # that freeing an engine may take after the last answer
needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian: prometheus)"
)


def read(name: str) -> str:
    return (DEPLOY / name).read_text(encoding="utf-8")


def kubernetes() -> dict[str, dict[str, Any]]:
    return {each["kind"]: each for each in yaml.safe_load_all(read("kubernetes.yaml"))}


def container() -> dict[str, Any]:
    (only,) = kubernetes()["Deployment"]["spec"]["template"]["spec"]["containers"]
    return only


def dockerfile(name: str) -> list[tuple[str, str]]:
    """(instruction, arguments) of each step."""
    text = re.sub(r"^#.*\n", "", read(name), flags=re.M).replace("\\\n", " ")
    lines = [line.split(None, 1) for line in text.splitlines() if line.strip()]
    return [(name, " ".join(rest.split())) for name, rest in lines]


def started_with() -> dict[str, list[str]]:
    """What each file gives `edje serve`."""
    compose = yaml.safe_load(read("compose.yaml"))
    given = {name: json.loads(dict(dockerfile(name))["CMD"]) for name in DOCKERFILES}
    given["compose.yaml"] = compose["services"]["edje"]["command"]
    given["kubernetes.yaml"] = container()["args"]
    return given


def seconds_of(name: str, option: str) -> float:
    words = " ".join(started_with()[name]).replace("=", " ").split()
    return float(words[words.index(option) + 1])


@pytest.mark.parametrize("name", [*DOCKERFILES, "compose.yaml", "kubernetes.yaml"])
def test_every_option_exists(name: str) -> None:
    shown = CliRunner().invoke(app, ["serve", "--help"]).output
    known = set(re.findall(r"^  (?:-\w, )?(--[a-z-]+)", shown, re.M))
    given = {word.partition("=")[0] for word in started_with()[name] if word.startswith("--")}
    assert {"--store", "--host", "--drain"} <= given <= known


def test_the_options_of_the_readme_exist() -> None:
    shown = CliRunner().invoke(app, ["serve", "--help"]).output
    named = set(re.findall(r"`(--[a-z-]+)[ =`]", read("README.md")))
    known = set(re.findall(r"--[a-z-]+", shown)) | {"--profile", "--gpus"}
    assert {"--grace", "--drain", "--max-wait"} <= named <= known


def test_the_two_dockerfiles_differ_in_extras_and_the_cards_variables() -> None:
    plain, gpu = (dockerfile(name) for name in DOCKERFILES)
    assert [step for step in plain if step not in gpu] == [("ARG", "EXTRAS=cpu,serve")]
    nvidia = "NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility"
    assert [step for step in gpu if step not in plain] == [
        ("ARG", "EXTRAS=gpu,serve"),
        ("ENV", nvidia),
    ]


def test_the_image_runs_as_nobody_in_particular() -> None:
    steps = dict(dockerfile("Dockerfile"))
    pod = kubernetes()["Deployment"]["spec"]["template"]["spec"]["securityContext"]
    assert steps["USER"] == str(pod["runAsUser"]) == "10001"
    assert json.loads(steps["ENTRYPOINT"]) == ["edje", "serve"]
    assert steps["STOPSIGNAL"] == "SIGTERM"
    assert container()["securityContext"]["readOnlyRootFilesystem"]


def test_what_the_dockerfile_copies_is_not_ignored() -> None:
    kept = [
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    ]
    assert {"constraints.txt", "pyproject.toml", "README.md", "LICENSE", "runtime"} <= set(kept)
    assert [name for name in kept if not list(ROOT.glob(name))] == []


def test_a_pod_has_the_time_that_its_end_takes() -> None:
    sleep, seconds = container()["lifecycle"]["preStop"]["exec"]["command"]
    spec = kubernetes()["Deployment"]["spec"]["template"]["spec"]
    grace, drain = (seconds_of("kubernetes.yaml", each) for each in ("--grace", "--drain"))
    assert sleep == "sleep"
    assert float(seconds) + grace + drain + FREE_S <= spec["terminationGracePeriodSeconds"]


def test_a_composed_server_has_the_time_that_its_end_takes() -> None:
    service = yaml.safe_load(read("compose.yaml"))["services"]["edje"]
    grace, drain = (seconds_of("compose.yaml", each) for each in ("--grace", "--drain"))
    assert grace + drain + FREE_S <= float(service["stop_grace_period"].removesuffix("s"))


def test_threads_are_those_of_the_limit() -> None:
    service = yaml.safe_load(read("compose.yaml"))["services"]["edje"]
    limits = service["deploy"]["resources"]["limits"]
    assert seconds_of("compose.yaml", "--num-threads") == float(limits["cpus"])
    limits = container()["resources"]["limits"]
    given = next(word for word in container()["args"] if word.startswith("--num-threads"))
    assert given == f"--num-threads={limits['cpu']}"


def test_everything_selects_the_pods() -> None:
    found = kubernetes()
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert found["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert found["Service"]["spec"]["selector"] == labels
    assert found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    target = found["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]
    assert target["name"] == found["Deployment"]["metadata"]["name"]
    assert found["Service"]["spec"]["ports"][0]["targetPort"] == container()["ports"][0]["name"]


def probe_paths() -> set[str]:
    pod = container()
    probes = (pod[name] for name in ("startupProbe", "readinessProbe", "livenessProbe"))
    paths = {probe["httpGet"]["path"] for probe in probes}
    compose = yaml.safe_load(read("compose.yaml"))["services"]["edje"]
    for text in (compose["healthcheck"]["test"][-1], dict(dockerfile("Dockerfile"))["HEALTHCHECK"]):
        paths.add(re.findall(r"http://127.0.0.1:8000(/\w+)", text)[0])
    return paths


@pytest.fixture(scope="module")
def guarded(tiny_engine: Path, tiny_store: Path) -> Iterator[Running]:
    """A server that wants a key and refuses while anything waits, once it has been asked a lot."""
    options = ServiceOptions(max_wait_s=0.0, timeout_s=30.0)
    with running(settings_of(tiny_engine, tiny_store, service=options, keys=["key"])) as started:
        ask_in_every_way(started)
        yield started


def ask_in_every_way(server: Running) -> None:
    """Ask until each counter that has labels has some: answers, and a refusal for too much work."""
    key = {"authorization": "Bearer key"}
    body = {"query": "a cat", "documents": [f"img-{i % 12}" for i in range(3000)]}
    assert server.ask("/rerank", body).status == 401
    statuses: list[int] = []

    def ask() -> None:
        statuses.append(server.ask("/rerank", body, headers=key).status)

    for _ in range(20):
        asking = [threading.Thread(target=ask) for _ in range(4)]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()
        if 429 in statuses:
            break
    assert {200, 429} <= set(statuses)


def test_the_probes_need_no_key_and_answer(guarded: Running) -> None:
    assert probe_paths() == {"/livez", "/readyz"}
    for path in (*probe_paths(), "/metrics"):
        assert guarded.ask(path).status == 200


def expressions() -> dict[str, str]:
    """PromQL of the dashboard and of the rules, by where it stands."""
    found = {}
    board = json.loads(read("grafana.json"))
    for panel in board["panels"]:
        for target in panel["targets"]:
            found[f"panel {panel['id']} {target['refId']}: {panel['title']}"] = target["expr"]
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            metric = re.findall(r"label_values\((\w+), \w+\)", variable["query"]["query"])[0]
            found[f"variable {variable['name']}"] = metric
    for group in yaml.safe_load(read("alerts.yaml"))["groups"]:
        found.update({f"alert {rule['alert']}": rule["expr"] for rule in group["rules"]})
    hpa = kubernetes()["HorizontalPodAutoscaler"]["spec"]["metrics"]
    found["autoscaler"] = hpa[0]["pods"]["metric"]["name"]
    return found


def scraped(server: Running) -> dict[str, set[tuple[str, str]]]:
    """Each series' name, and the (label, value) pairs that it appears with."""
    found: dict[str, set[tuple[str, str]]] = {}
    for line in server.ask("/metrics").body.decode().splitlines():
        if not line.startswith("#"):
            name, labels = re.fullmatch(r"(\w+)(?:\{(.*)\})? \S+", line).groups()  # type: ignore[union-attr]
            found.setdefault(name, set()).update(re.findall(r'(\w+)="([^"]*)"', labels or ""))
    return found


# What Prometheus adds to every series of a target.
OF_THE_TARGET = {"job", "instance"}


def test_every_metric_and_label_exists(guarded: Running) -> None:
    live = scraped(guarded)
    wrong = []
    for where, expression in expressions().items():
        for name, matchers in re.findall(r"\b((?:edje|process)_\w+)(?:\{([^}]*)\})?", expression):
            if name not in live:
                wrong.append(f"{where}: there is no {name}")
                continue
            for label, operator, value in re.findall(r'(\w+)(=~|=)"([^"]*)"', matchers):
                if label in OF_THE_TARGET:
                    continue
                values = {given for key, given in live[name] if key == label}
                if not values or (operator == "=" and value not in values):
                    wrong.append(f"{where}: {name} has no {label}={value!r}, but {values}")
        names = re.findall(r"\b((?:edje|process)_\w+)", expression)
        labels = {key for name in names for key, _ in live.get(name, ())} | OF_THE_TARGET
        for listed in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression):
            for label in re.findall(r"\w+", listed):
                if label not in labels:
                    wrong.append(f"{where}: nothing has a label {label}")
    assert wrong == []
    assert len(expressions()) > 25


def test_the_dashboard_shows_every_metric_of_ours(guarded: Running) -> None:
    """What is counted and never shown helps nobody."""
    shown = "\n".join(expressions().values())
    types = re.findall(r"# TYPE (edje_\w+) ", guarded.ask("/metrics").body.decode())
    names = [name for name in types if not name.endswith("_created")]
    assert [name for name in names if name not in shown] == []


def test_the_table_of_the_readme_has_every_metric_of_ours(guarded: Running) -> None:
    types = re.findall(r"# TYPE (edje_\w+) ", guarded.ask("/metrics").body.decode())
    names = [name for name in types if not name.endswith("_created")]
    assert [name for name in names if f"`{name}" not in read("README.md")] == []


def test_panels_do_not_lie_on_each_other() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(read("grafana.json"))["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert at["x"] + at["w"] <= 24
        assert not cells & taken, panel["title"]
        taken |= cells


def test_every_alert_says_what_to_do() -> None:
    for group in yaml.safe_load(read("alerts.yaml"))["groups"]:
        for rule in group["rules"]:
            assert set(rule["annotations"]) == {"summary", "description", "action"}, rule["alert"]
            assert f"`{rule['alert']}`" in read("README.md")


@needs_promtool
def test_prometheus_reads_the_rules_and_the_panels(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{number}", "expr": expression.replace("$__rate_interval", "5m")}
        for number, expression in enumerate(expressions().values())
    ]
    asked = tmp_path / "panels.yaml"
    asked.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    for path in (DEPLOY / "alerts.yaml", asked):
        made = subprocess.run(["promtool", "check", "rules", path], capture_output=True, text=True)
        assert made.returncode == 0, made.stdout + made.stderr


@needs_promtool
def test_prometheus_has_nothing_to_say_against_the_metrics(guarded: Running) -> None:
    text = guarded.ask("/metrics").body
    made = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True)
    assert made.returncode == 0, made.stdout + made.stderr


AT = 'instance="a", job="edje"'
# What makes each alert fire: series as `promtool test rules` writes them, minute by minute.
FIRES = {
    "EdjeNotReady": {f"edje_ready{{{AT}}}": "1x2 0x30"},
    "EdjeGone": {f"edje_ready{{{AT}}}": "1x3 _x30", f"up{{{AT}}}": "1x3 0x30"},
    "EdjeServerErrors": {
        f'edje_requests_total{{{AT}, status="200", dialect="cohere"}}': "0+600x40",
        f'edje_requests_total{{{AT}, status="500", dialect="cohere"}}': "0+10x40",
    },
    "EdjeQueueNearLimit": {
        f"edje_queue_seconds{{{AT}}}": "9x40",
        f"edje_queue_limit_seconds{{{AT}}}": "10x40",
    },
    "EdjeRefusesRequests": {
        f'edje_requests_total{{{AT}, status="200", dialect="cohere"}}': "0+600x40",
        f'edje_refusals_total{{{AT}, reason="overloaded"}}': "0+60x40",
    },
    "EdjeBadRecords": {f"edje_bad_records_total{{{AT}}}": "0x10 1x30"},
    "EdjeLogLinesLost": {f"edje_log_lines_lost_total{{{AT}}}": "0x10 3x30"},
    "EdjeReloadFailed": {f'edje_reloads_total{{{AT}, outcome="failed"}}': "0x10 1x30"},
}
QUIET = {
    f"edje_ready{{{AT}}}": "1x40",
    f"up{{{AT}}}": "1x40",
    f'edje_requests_total{{{AT}, status="200", dialect="cohere"}}': "0+600x40",
    f'edje_requests_total{{{AT}, status="500", dialect="cohere"}}': "0+1x40",
    f'edje_refusals_total{{{AT}, reason="overloaded"}}': "0+1x40",
    f"edje_queue_seconds{{{AT}}}": "2x40",
    f"edje_queue_limit_seconds{{{AT}}}": "10x40",
    f"edje_bad_records_total{{{AT}}}": "7x40",
    f"edje_log_lines_lost_total{{{AT}}}": "7x40",
    f'edje_reloads_total{{{AT}, outcome="failed"}}': "7x40",
}


def fired(tmp_path: Path, series: dict[str, str], alert: str) -> bool:
    """Whether an alert fires for a target of these series, after 20 minutes."""
    case = {
        "interval": "1m",
        "input_series": [{"series": name, "values": each} for name, each in series.items()],
        "alert_rule_test": [{"eval_time": "20m", "alertname": alert, "exp_alerts": []}],
    }
    path = tmp_path / "case.yaml"
    path.write_text(yaml.safe_dump({"rule_files": [str(DEPLOY / "alerts.yaml")], "tests": [case]}))
    command = shlex.join(["promtool", "test", "rules", str(path)])
    made = subprocess.run(command, shell=True, capture_output=True, text=True)
    shown = made.stdout + made.stderr
    assert "error" not in shown.lower() or "got:" in shown, shown
    return made.returncode != 0


@needs_promtool
@pytest.mark.parametrize("alert", FIRES)
def test_each_alert_fires_when_it_should_and_only_then(alert: str, tmp_path: Path) -> None:
    assert fired(tmp_path, {**QUIET, **FIRES[alert]}, alert)
    assert not fired(tmp_path, QUIET, alert)


def test_every_alert_is_tried() -> None:
    groups = yaml.safe_load(read("alerts.yaml"))["groups"]
    assert {rule["alert"] for group in groups for rule in group["rules"]} == set(FIRES)


def test_the_json_of_the_readme_parses() -> None:
    blocks = re.findall(r"^```json\n(.*?)^```", read("README.md"), re.M | re.S)
    assert len(blocks) >= 3
    for block in blocks:
        json.loads(block)
