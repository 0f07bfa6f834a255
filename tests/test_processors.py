"""How many processors there are, by cgroups of both versions, and how busy they are."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from pinaivu_box import processors


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def quota(root: Path, groups: str) -> float:
    write(root / "proc", cgroup=groups)
    return processors.quota(root / "proc", root / "cgroup")


def test_the_smallest_limit_of_the_groups_above_counts(tmp_path: Path) -> None:
    write(tmp_path / "cgroup/a/b", cpu__max="max 100000\n")
    write(tmp_path / "cgroup/a", cpu__max="150000 100000\n")
    write(tmp_path / "cgroup", cpu__max="400000 100000\n")
    assert quota(tmp_path, "0::/a/b\n") == 1.5


def test_in_a_container_the_mounted_group_is_its_own(tmp_path: Path) -> None:
    write(tmp_path / "cgroup", cpu__max="50000 100000\n")
    assert quota(tmp_path, "0::/docker/0123\n") == 0.5


def test_the_first_version_of_cgroups(tmp_path: Path) -> None:
    write(
        tmp_path / "cgroup/cpu,cpuacct/job", cpu__cfs_quota_us="200000", cpu__cfs_period_us="100000"
    )
    write(tmp_path / "cgroup/memory/job", cpu__cfs_quota_us="1", cpu__cfs_period_us="100000")
    assert quota(tmp_path, "5:memory:/job\n4:cpu,cpuacct:/job\n") == 2.0


@pytest.mark.parametrize("text", ["max 100000", "-1 100000", "0 100000", "", "nonsense", "1 0"])
def test_no_limit_is_no_limit(tmp_path: Path, text: str) -> None:
    write(tmp_path / "cgroup", cpu__max=text)
    assert quota(tmp_path, "0::/\n") == math.inf


def test_a_machine_without_cgroups_has_no_limit(tmp_path: Path) -> None:
    assert processors.quota(tmp_path / "none", tmp_path / "none") == math.inf


def test_it_computes_with_no_more_cores_than_the_group_may_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(processors, "physical_cores", lambda: 8)
    for limit, cores in ((math.inf, 8), (16.0, 8), (2.5, 3), (0.25, 1)):
        monkeypatch.setattr(processors, "quota", lambda limit=limit: limit)
        assert processors.usable_cores() == cores


def test_what_is_taken_is_what_is_not_idle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  100 0 50 1000 10 0 0 5 0 0\ncpu0 1 2 3\n")

    def later(_: float) -> None:
        stat.write_text("cpu  140 5 60 1030 20 0 0 10 7 0\ncpu0 1 2 3\n")

    monkeypatch.setattr("pinaivu_box.processors.time.sleep", later)
    assert processors.taken(0.5, stat) == 0.6
    assert processors.taken(0.5, stat) is None  # no tick has passed
    assert processors.taken(0.5, tmp_path / "none") is None
