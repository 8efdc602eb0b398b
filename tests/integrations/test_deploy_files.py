"""The files in deploy/: what they say of the server is so, and the tools that read them accept them."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import yaml
from live_server import Live, serve
from replicas import DEPLOY
from transformers import AutoModelForCausalLM

import hf_paged
from hf_paged.integrations.openai_server import ServerOptions
from hf_paged.integrations.openai_server.options import parse_options


@pytest.fixture(scope="module")
def live(tiny_checkpoint: str) -> Iterator[Live]:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint).eval()
    with serve(hf_paged.wrap(model, page_size=16, num_pages=64)) as running:
        yield running


def queries(file: str) -> list[str]:
    """The PromQL in the dashboard or the alerts."""
    text = (DEPLOY / file).read_text()
    if file.endswith(".json"):
        board = json.loads(text)
        asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
        return asked + [one["query"]["query"] for one in board["templating"]["list"] if one["type"] == "query"]
    return [rule["expr"] for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]


@pytest.mark.parametrize("file", ["grafana/dashboard.json", "prometheus/alerts.yml"])
def test_dashboard_and_alerts_ask_for_what_there_is(live: Live, file: str) -> None:
    assert httpx.post(live.url + "/v1/completions", json={"prompt": "x", "max_tokens": 2}).status_code == 200
    lines = [line for line in httpx.get(live.url + "/metrics").text.splitlines() if line[:1] != "#"]
    labels: dict[str, set[str]] = {}
    for line in lines:
        name, _, rest = line.partition("{")
        labels.setdefault(name, set()).update(re.findall(r'(\w+)="', rest))
    asked = [name for query in queries(file) for name in re.findall(r"hf_paged:\w+", query)]
    assert len(set(asked)) >= 6
    assert set(asked) <= set(labels), "no such metrics"
    for query in queries(file):
        for name, told in re.findall(r"(hf_paged:\w+)\{([^}]*)\}", query):
            used = set(re.findall(r"(\w+)=", told)) - {"instance", "job"}
            assert used <= labels[name], f"{name} has no such labels: {query}"


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads((DEPLOY / "grafana/dashboard.json").read_text())["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken and max(x for x, _ in cells) < 24, panel["title"]
        taken |= cells


def manifests(overlay: str) -> list[dict[str, Any]]:
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl, which puts kustomizations together, is not installed")
    command = ["kubectl", "kustomize", str(DEPLOY / "k8s" / "overlays" / overlay)]
    return list(yaml.safe_load_all(subprocess.run(command, check=True, capture_output=True, text=True).stdout))


@pytest.mark.parametrize("overlay", ["cpu", "gpu"])
def test_manifests_fit_the_server(live: Live, overlay: str, tmp_path: Any) -> None:
    found = {one["kind"]: one for one in manifests(overlay) if one["metadata"]["name"] != "hf-paged-pods"}
    spec = found["Deployment"]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    file = tmp_path / "options.yaml"
    file.write_text(found["ConfigMap"]["data"]["options.yaml"])
    options, args = parse_options(["--config", str(file)])
    assert args.model and options.host == "0.0.0.0"
    assert options.port == container["ports"][0]["containerPort"]
    before_stop = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert spec["terminationGracePeriodSeconds"] > before_stop + options.drain_timeout_s
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert httpx.get(live.url + container[probe]["httpGet"]["path"]).status_code == 200
    assert (
        found["Service"]["spec"]["selector"].items()
        <= found["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
    )
    assert container["image"] == {"cpu": "hf-paged:cpu", "gpu": "hf-paged:cuda"}[overlay]
    claimed = [one["persistentVolumeClaim"]["claimName"] for one in spec["volumes"] if "persistentVolumeClaim" in one]
    assert claimed == [found["PersistentVolumeClaim"]["metadata"]["name"]]


def test_compose_waits_for_the_drain() -> None:
    services = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    targets = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())["scrape_configs"][0]["static_configs"]
    for name in ("server-cpu", "server-gpu"):
        assert int(services[name]["stop_grace_period"].removesuffix("s")) > ServerOptions().drain_timeout_s
        assert targets == [{"targets": [f"{services[name]['networks']['default']['aliases'][0]}:8000"]}]
        assert (DEPLOY.parent / services[name]["build"]["dockerfile"]).is_file()


@pytest.mark.parametrize("file", ["Dockerfile.cpu", "Dockerfile.cuda"])
def test_images_copy_what_there_is(file: str) -> None:
    """Every source of a COPY is in the repository and let through by .dockerignore."""
    let_through = set(re.findall(r"(?m)^!(\S+)", (DEPLOY.parent / ".dockerignore").read_text()))
    copied = re.findall(r"(?m)^COPY (?!--from)(.+) \S+$", (DEPLOY / file).read_text())
    sources = {source for line in copied for source in line.split()}
    assert sources == let_through
    assert all((DEPLOY.parent / source).exists() for source in sources)


@pytest.mark.parametrize(("kind", "file"), [("config", "prometheus.yml"), ("rules", "alerts.yml")])
def test_promtool_accepts(kind: str, file: str) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed")
    command = ["promtool", "check", kind, str(DEPLOY / "prometheus" / file)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
