"""`tests/gpu/run` on a machine without a GPU: with fake ones its checks run, without it says so."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.support import fake_gpu
from tests.support.paths import ROOT
from tests.support.process_box import environment


def run(tmp_path: Path, *options: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ROOT / "tests/gpu/run", "--results", tmp_path / "results", *options],
        env=environment(**env), capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_with_a_gpu_its_checks_pass(tmp_path: Path) -> None:
    gpus = fake_gpu.environment("CUDA0:1024", shared=tmp_path)
    done = run(tmp_path, "--only", "devices,tokens,two,memory", **gpus)
    assert done.returncode == 0, done.stdout + done.stderr
    (report,) = (tmp_path / "results").glob("*-gpu.md")
    assert report.read_text().count("| passed |") == 4


def test_without_a_gpu_it_says_that_nothing_could_be_done(tmp_path: Path) -> None:
    done = run(tmp_path, PINAIVU_BACKENDS=str(fake_gpu.backend()))
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout.count("not done") == 6
    assert "no backend shows a GPU" in done.stdout
