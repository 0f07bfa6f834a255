"""Prefixes that an engine saves when it is unloaded, and the next one restores."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pinaivu_box.engine.messages import Add, SavedPrefixes
from pinaivu_box.engine.prefix_cache import PrefixScope
from pinaivu_box.engine.prefix_store import MIN_TOKENS, PrefixStore
from pinaivu_box.engine.runner import Batch
from tests.support.engine_harness import Heard, add, alone, assert_only_kept, make, run
from tests.support.real_runner import real_runner

KEY = bytes(range(32))
BINDING = "build 1\nf16"
LONG = "a long system prompt. " * 12
SIZES: dict[str, Any] = {"context": 1000, "kv_tokens": 2000, "max_sequences": 4}
TOKENS, SHARE = list(range(1000, 1000 + MIN_TOKENS)), PrefixScope("acc_1")


def store(
    folder: Path, *, key: bytes = KEY, size: int = 10**6, binding: str = BINDING
) -> PrefixStore:
    return PrefixStore(SavedPrefixes(str(folder), key, size), binding)


def cells(size: int = 3_000_000) -> memoryview:
    return memoryview(np.arange(size // 4, dtype=np.int32).tobytes())


def saved_by_an_engine(folder: Path, *requests: Add, **more: Any) -> list[Path]:
    engine, _ = make(store=store(folder, **more), **SIZES)
    run(engine, requests)
    engine.save_prefixes()
    return sorted(folder.iterdir())


def answered(folder: Path, request: Add, **more: Any) -> tuple[Heard, int]:
    """What an engine that wakes says, and how many tokens it computed for that."""
    engine, runner = make(store=store(folder, **more), **SIZES)
    heard = run(engine, [request])
    assert_only_kept(engine, runner)
    return heard, runner.computed


# -- what the next engine has of it ----------------------------------------------------------------


def test_the_next_engine_goes_on_with_what_was_saved_and_says_the_same(tmp_path: Path) -> None:
    first = add("first", LONG + "one", scope="acc_1")
    second = add("second", LONG + "two", scope="acc_1")
    expected = alone([second], **SIZES)["second"]
    assert len(saved_by_an_engine(tmp_path, first)) == 1
    heard, computed = answered(tmp_path, second)
    assert heard.answer("second") == expected
    assert heard.load.tokens_restored >= len(LONG)
    assert heard.cached["second"] == [pytest.approx(len(LONG), abs=40)]
    assert computed < 100


def test_no_other_account_finds_it(tmp_path: Path) -> None:
    saved_by_an_engine(tmp_path, add("first", LONG, scope="acc_1"))
    for scope in ("acc_2", "acc_1/x", ""):
        heard, computed = answered(tmp_path, add("second", LONG, scope=scope))
        assert heard.load.tokens_restored == 0 and computed > len(LONG)
    heard, _ = answered(tmp_path, add("second", LONG, scope="acc_1"))
    assert heard.load.tokens_restored > 0


def test_nor_another_model_box_build_or_kind_of_cache(tmp_path: Path) -> None:
    request = add("first", LONG, scope="acc_1")
    saved_by_an_engine(tmp_path, request)
    others: list[dict[str, Any]] = [
        {"key": bytes(32)}, {"binding": "build 2\nf16"}, {"binding": "build 1\nq8_0"},
    ]  # fmt: skip
    for other in others:
        heard, _ = answered(tmp_path, request, **other)
        assert heard.load.tokens_restored == 0


def test_what_peers_asked_and_what_is_private_is_never_written(tmp_path: Path) -> None:
    requests = [
        add("peer", LONG, scope="node_0123/tag"),
        add("private", LONG + "x", scope=""),
        add("short", "a short one", scope="acc_1"),
    ]
    assert saved_by_an_engine(tmp_path, *requests) == []


def test_a_restored_prefix_makes_room_and_gives_way_as_any_other(tmp_path: Path) -> None:
    """With cells for little more than it: what else was cached is evicted, and nothing is lost."""
    saved_by_an_engine(tmp_path, add("first", LONG, scope="acc_1"))
    sizes: dict[str, Any] = {"context": 400, "kv_tokens": 420, "max_sequences": 2}
    engine, runner = make(store=store(tmp_path), **sizes)
    before = add("before", "b" * 200, scope="acc_2")
    after = add("after", LONG + "!", scope="acc_1")
    run(engine, [before])
    heard = run(engine, [after])
    assert heard.answer("after") == alone([after], **sizes)["after"]
    assert heard.load.tokens_restored > 0
    assert_only_kept(engine, runner)


def test_the_cells_of_a_real_model_are_the_same_after_they_were_restored() -> None:
    first, second = real_runner(), real_runner()
    tokens, positions = list(range(100, 130)), list(range(30))
    first.decode(Batch.of(tokens[:29], positions[:29], [3] * 29, [0] * 29))
    state = first.state(3, 2**40)
    assert state is not None and second.restore(5, bytearray(state))
    assert first.state(3, len(state) - 1) is None
    assert not second.restore(6, bytearray(b"no such state" * 10))
    computed = first.decode(Batch.of(tokens[29:], [29], [3], [1])).copy()
    restored = second.decode(Batch.of(tokens[29:], [29], [5], [1]))
    np.testing.assert_allclose(restored, computed, atol=1e-3)
    first.close()
    second.close()


# -- files -------------------------------------------------------------------------------------


def test_files_are_for_their_owner_only_and_tell_nothing(tmp_path: Path) -> None:
    (file,) = saved_by_an_engine(tmp_path, add("first", LONG, scope="acc_1"))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    data = file.read_bytes()
    for text in (LONG.encode(), b"acc_1", b"a\0\0\0 \0\0\0l\0\0\0"):
        assert text not in data
    assert "acc" not in file.name


def test_a_file_that_was_damaged_anywhere_is_ignored_and_deleted(tmp_path: Path) -> None:
    assert store(tmp_path, size=10**7).save(TOKENS, SHARE, cells())
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    spots = [0, 5, 20, 41, 44, 60, 500, len(whole) // 3, len(whole) // 2, len(whole) - 1]
    damages = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in spots]
    damages += [whole[:at] for at in (0, 10, 45, 200, len(whole) // 2, len(whole) - 1)]
    damages += [whole + b"x", whole + whole, b"", os.urandom(1000)]
    piece = 1024 * 1024 + 17
    start = len(whole) - 2 * piece
    damages.append(whole[:start] + whole[start + piece :])  # one piece is missing
    for number, damaged in enumerate(damages):
        path.write_bytes(damaged)
        again = store(tmp_path, size=10**7)
        found = again.find(TOKENS, SHARE, 0)
        assert found is None or again.read(found) is None, number
        assert not path.exists(), number
    path.write_bytes(whole)
    again = store(tmp_path, size=10**7)
    found = again.find(TOKENS, SHARE, 0)
    assert found is not None and bytes(again.read(found) or b"") == bytes(cells())


def test_a_file_of_another_scope_under_this_ones_name_is_deleted(tmp_path: Path) -> None:
    assert store(tmp_path, size=10**7).save(TOKENS, PrefixScope("acc_2"), cells())
    (foreign,) = tmp_path.iterdir()
    assert store(tmp_path, size=10**7).save(TOKENS, SHARE, cells())
    (own,) = [path for path in tmp_path.iterdir() if path != foreign]
    foreign.replace(own)
    assert store(tmp_path).find(TOKENS, SHARE, 0) is None
    assert list(tmp_path.iterdir()) == []


def test_the_files_that_were_used_last_stay_within_the_budget(tmp_path: Path) -> None:
    kept = store(tmp_path, size=10_000_000)
    for number in range(5):
        tokens = [number, *TOKENS]
        assert kept.save(tokens, SHARE, cells())
        for path in tmp_path.iterdir():  # as if that had been long before the next
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 100))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 10_000_000
    again = store(tmp_path)
    there = [n for n in range(5) if again.find([n, *TOKENS], SHARE, 0) is not None]
    assert there == [2, 3, 4]
    assert not store(tmp_path, size=1000).save([9, *TOKENS], SHARE, cells())


def test_a_conversation_that_went_on_takes_the_place_of_its_beginning(tmp_path: Path) -> None:
    kept = store(tmp_path, size=10**7)
    kept.save(TOKENS, SHARE, cells(1000))
    again = store(tmp_path, size=10**7)
    longer = [*TOKENS, 7, 8, 9]
    assert again.is_wanted(longer, SHARE)
    again.save(longer, SHARE, cells(1000))
    assert len(list(tmp_path.iterdir())) == 1
    assert not store(tmp_path).is_wanted(longer, SHARE)


def test_a_folder_that_is_gone_or_not_writable_stops_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "prefixes"
    request = add("first", LONG, scope="acc_1")
    engine, _ = make(store=store(folder), **SIZES)
    heard = run(engine, [request])
    assert engine.save_prefixes().prefixes == 0
    assert heard.answer("first") == alone([request], **SIZES)["first"]
