"""The Kubernetes objects: against the API's own schemas, against golden copies, and against what starts in the pods."""

import os
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from epd.plan import kubernetes, placing, topology
from epd_proxy.settings import load_config
from epd_serve import settings as serve

GOLDEN = Path(__file__).parent / "golden"
API_VERSIONS = ("1.32", kubernetes_validate.latest_version())
"""The first one whose pods have the label `pod-index` for good, and the newest there is a schema of."""
IMAGES = {
    "EPD_IMAGE": "r.example/team/ascend-epd-a2:0.1.0",
    "EPD_PROXY_IMAGE": "r.example:5000/ascend-epd-proxy@sha256:" + "a" * 64,
    "EPD_STORE_IMAGE": "ascend-epd-store:0.1.0",
}
CASES = [(name, hardware) for name in ("1e1pd", "2e2p3d") for hardware in ("cpu", "a2", "a3", "a5")]


def cluster(name="1e1p1d", hardware="a2", parallel=None, **changes):
    found = {
        "topology": topology.parse(name, parallel),
        "hardware": hardware,
        "limits": placing.Limits(max_model_len=32768, max_num_seqs=128, store_size_mb=8192),
        "images": IMAGES,
        "model": "/models",
        "model_folder": "Qwen3-VL-8B-Instruct",
        "served_model_name": "Qwen3-VL-8B-Instruct",
        "vllm_environment": {"HCCL_BUFFSIZE": "1024"},
        "extra_args": {"encode": "--seed 7"},
        "proxy_environment": {"EPD_PROXY_MAX_RETRIES": "3"},
        "memory_bytes": 128 << 30,
        "npu_resource": kubernetes.NPU_RESOURCE.get(hardware, ""),
    }
    return kubernetes.Cluster(**{**found, **changes})


def objects(made):
    texts = kubernetes.render(made)
    assert yaml.safe_load(texts["kustomization.yaml"])["resources"] == [name for name in texts if name[0] != "k"]
    return [item for name, text in texts.items() if name[0] != "k" for item in yaml.safe_load_all(text)]


def pods(made):
    """Return each workload's name, replicas and pod."""
    return {
        item["metadata"]["name"]: (item["spec"]["replicas"], item["spec"]["template"]["spec"])
        for item in objects(made)
        if item["kind"] in ("StatefulSet", "Deployment")
    }


def environment(pod, index=0):
    """Return the environment of a pod's container as Kubernetes fills it in."""
    filled = {"metadata.labels['apps.kubernetes.io/pod-index']": str(index), "status.podIP": "10.0.0.7"}
    return {
        entry["name"]: entry.get("value", "") or filled[entry["valueFrom"]["fieldRef"]["fieldPath"]]
        for entry in pod["containers"][0]["env"]
    }


@pytest.mark.parametrize(("name", "hardware"), CASES)
@pytest.mark.parametrize("version", API_VERSIONS)
def test_every_object_is_valid_in_the_api(name, hardware, version):
    found = objects(cluster(name, hardware))
    assert {item["kind"] for item in found} == {"StatefulSet", "Deployment", "Service", "PodDisruptionBudget"}
    for item in found:
        kubernetes_validate.validate(item, version, strict=True)


def test_the_schemas_would_find_a_fault():
    item = next(item for item in objects(cluster()) if item["kind"] == "StatefulSet")
    item["spec"]["replica"] = 2
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(item, API_VERSIONS[0], strict=True)


@pytest.mark.parametrize("hardware", ["cpu", "a2", "a5"])
def test_the_text_equals_the_golden_copy(hardware):
    """`EPD_UPDATE_GOLDEN=1 pytest tests/scripts/plan` writes the copies anew; read their diff before you commit it."""
    found = "".join(f"### {name}\n{text}" for name, text in kubernetes.render(cluster(hardware=hardware)).items())
    golden = GOLDEN / f"kubernetes-1e1p1d-{hardware}.txt"
    if os.environ.get("EPD_UPDATE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(found)
    assert found == golden.read_text()


@pytest.mark.parametrize("hardware", ["a2", "a3", "a5"])
def test_instances_get_their_cards_from_the_device_plugin(hardware):
    parallel = {"decode": topology.Parallel(2, 2)}
    found = pods(cluster("1e2p2d", hardware, parallel))
    resource = kubernetes.NPU_RESOURCE[hardware]
    for role, cards in (("encode", "1"), ("prefill", "1"), ("decode", "4")):
        assert found[role][1]["containers"][0]["resources"]["limits"][resource] == cards
        assert found[role][1].get("hostNetwork", False) == (role != "encode")
        assert found[role][1]["containers"][0]["securityContext"].get("privileged", False) == (hardware == "a5")
    assert resource not in str(found["proxy"]) + str(found["mooncake-store"])
    mounted = {mount["mountPath"] for mount in found["prefill"][1]["containers"][0]["volumeMounts"]}
    assert ("/etc/hccn.conf" in mounted) == (hardware != "a5")


@pytest.mark.parametrize(("name", "hardware"), CASES)
def test_the_proxy_asks_each_instance_where_that_listens(name, hardware, monkeypatch):
    """The whole way: what the pod of an instance is told, what its entrypoint makes of it, what the proxy is told."""
    monkeypatch.setattr(os, "access", lambda *_: True)  # the model is on the volume
    found = pods(cluster(name, hardware))
    told = load_config(found["proxy"][1]["containers"][0]["args"], environment(found["proxy"][1]))
    stages = told.topology.stages()
    listening = {}
    for role, (replicas, pod) in found.items():
        if role not in topology.ROLES:
            continue
        for index in range(replicas):
            settings = serve.read_settings(role, environment(pod, index))
            listening[f"{role}-{index}.{role}"] = settings.port
    asked = dict(url.removeprefix("http://").split(":") for urls in stages.values() for url in urls)
    assert {host: int(port) for host, port in asked.items()} == listening


@pytest.mark.parametrize("hardware", ["cpu", "a2"])
def test_the_pool_s_clients_agree_on_how_they_find_each_other(hardware):
    found = pods(cluster(hardware=hardware))
    ways = {
        serve.read_settings(role, environment(found[role][1]) | {"EPD_MODEL": "org/model"}).mooncake_metadata
        for role in ("encode", "prefill", "mooncake-store")
    }
    assert len(ways) == 1


def test_two_prefill_instances_on_one_node_share_no_port():
    parallel = {"prefill": topology.Parallel(2, 1), "decode": topology.Parallel(4, 1)}
    _, pod = pods(cluster("1e2p1d", parallel=parallel))["prefill"]
    one, two = (serve.read_settings("prefill", environment(pod, i) | {"EPD_MODEL": "org/model"}) for i in range(2))
    assert (two.port - one.port, two.ec_metrics_port - one.ec_metrics_port, two.kv_port - one.kv_port) == (1, 1, 2)
    assert one.peer_parallel.tensor == 4


def test_each_worker_of_the_proxy_is_reached_by_the_callbacks():
    made = cluster(proxy_environment={"EPD_PROXY_WORKERS": "3"})
    service = next(item for item in objects(made) if item["metadata"]["name"] == "metaserver")
    assert [port["port"] for port in service["spec"]["ports"]] == [8001, 8002, 8003]
    kubernetes_validate.validate(service, API_VERSIONS[0], strict=True)


def test_every_image_is_one_that_kustomize_can_replace():
    made = cluster()
    images = {item["name"]: item for item in yaml.safe_load(kubernetes.render(made)["kustomization.yaml"])["images"]}
    assert {pod["containers"][0]["image"] for _, pod in pods(made).values()} == set(images)
    assert images["ascend-epd-a2"] == {
        "name": "ascend-epd-a2", "newName": "r.example/team/ascend-epd-a2", "newTag": "0.1.0",
    }  # fmt: skip
    assert images["ascend-epd-proxy"]["newName"] == "r.example:5000/ascend-epd-proxy"
    assert images["ascend-epd-proxy"]["digest"].startswith("sha256:a")


def test_every_pod_is_hardened_and_may_be_drained_one_at_a_time():
    found = objects(cluster())
    for role, (_, pod) in pods(cluster()).items():
        assert pod["securityContext"]["runAsUser"] == 1000, role
        assert pod["containers"][0]["securityContext"]["capabilities"] == {"drop": ["ALL"]}, role
        assert pod["containers"][0]["securityContext"]["readOnlyRootFilesystem"], role
        assert pod["containers"][0]["livenessProbe"], role
        assert pod["containers"][0]["resources"]["limits"]["memory"], role
    budgets = {item["metadata"]["name"] for item in found if item["kind"] == "PodDisruptionBudget"}
    assert budgets == {"encode", "prefill", "decode"}


def test_a_model_of_a_hub_needs_no_volume_and_may_be_downloaded():
    _, pod = pods(cluster(model="org/model", model_folder=""))["encode"]
    assert environment(pod)["HF_HUB_OFFLINE"] == "0"
    assert "models" not in {volume["name"] for volume in pod["volumes"]}
