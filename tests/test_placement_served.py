"""A box on fake GPUs, whose memory a fake NVML tells: what it serves, and what it says of that."""

from __future__ import annotations

from pathlib import Path

from pinaivu_box.models import bundled
from tests.support import fake_gpu
from tests.support.in_process_command import run_command, run_command_json
from tests.support.process_box import Box, wait_until

CONFIG = """
[engine]
context = 1024
kv_tokens = 2048
max_sequences = 4
keep_alive = "-1"
"""
MODEL = '[[model]]\nname = "{name}"\npath = "{path}"\n{more}\n'


def test_ps_says_why_each_engine_is_where_it_is(tmp_path: Path) -> None:
    """Another program has most of the larger GPU; later it needs the other one, too."""
    location, shared, home = bundled.find(), tmp_path / "gpus", tmp_path / "home"
    assert location is not None
    shared.mkdir()
    home.mkdir()
    models = MODEL.format(name="a:1", path=location.path, more="preload = true")
    models += MODEL.format(name="b:1", path=location.path, more="gpu_layers = 0")
    (home / "config.toml").write_text(CONFIG + models)
    (shared / "others").write_text("0 900\n")
    env = fake_gpu.environment(
        "CUDA0:1000,CUDA1:500", nvml="Large:1000:0,Small:500:0", shared=shared
    )
    box = Box(home, env={"OMP_WAIT_POLICY": "PASSIVE", **env}).start()
    try:
        wait_until(lambda: [e["state"] for e in box.engines()] == ["idle"], "a:1 is loaded")
        body = {"model": "b:1", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
        assert box.http("POST", "/v1/chat/completions", json=body).status_code == 200
        why = {each["model"]: each["why"] for each in run_command_json("ps", home=home)}
        assert why["a:1"].startswith("all on CUDA1: ")
        assert why["b:1"].endswith("on the CPU, as gpu_layers = 0 says")
        shown = run_command("ps", "--why", "--wide", home=home).stdout
        assert all(text in shown for text in why.values())
        (shared / "others").write_text("0 990\n1 215\n")
        wait_until(lambda: [e["model"] for e in box.engines()] == ["b:1"], "a:1 made way")
        body["model"] = "a:1"
        assert box.http("POST", "/v1/chat/completions", json=body).status_code == 200
        why = {each["model"]: each["why"] for each in run_command_json("ps", home=home)}
        assert "CPU" in why["a:1"]
    finally:
        box.end()
