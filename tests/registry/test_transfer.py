"""Models from registries: what is chosen, how it comes, and what does not count as it."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pinaivu_box.config import RegistryConfig
from pinaivu_box.errors import PullFailed
from pinaivu_box.models import projectors
from pinaivu_box.models import record as records
from pinaivu_box.models.partial_file import PIECE_BYTES
from pinaivu_box.models.record import ModelParameters
from pinaivu_box.registry import manifest
from pinaivu_box.registry import transfer as transfers
from pinaivu_box.registry.client import RegistryClient
from pinaivu_box.registry.manifest import Listing, choose
from pinaivu_box.registry.reference import HubModel, RegistryModel, UrlModel, parse
from pinaivu_box.registry.transfer import Transfer
from tests.support.registry_server import RegistryServer, registry_server
from tests.support.waiting import wait_until

pytestmark = pytest.mark.anyio
WEIGHTS = os.urandom(PIECE_BYTES * 9 + 12_345)
DIGEST = hashlib.sha256(WEIGHTS).hexdigest()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[RegistryServer]:
    monkeypatch.setattr(transfers, "_FIRST_RETRY_SECONDS", 0.01)
    with registry_server() as running:
        yield running


async def look_up(server: RegistryServer, name: str, token: str = "") -> Listing:
    reference = parse(name, RegistryConfig(ollama=server.url, hub=server.url))
    async with RegistryClient(server.url, token) as client:
        if isinstance(reference, RegistryModel):
            return await manifest.of_registry(client, reference)
        if isinstance(reference, HubModel):
            return await manifest.of_hub(client, reference)
        assert isinstance(reference, UrlModel)
        return manifest.of_url(reference)


async def pull(server: RegistryServer, name: str, folder: Path, token: str = "") -> Transfer:
    """Download it; checks that what stands in the folder is what the transfer says."""
    listing = await look_up(server, name, token)
    async with RegistryClient(server.url, token) as client:
        transfer = Transfer(client, listing, folder)
        await transfer.run()
    assert transfer.bytes == transfer.size and transfer.finishing
    for path, digest, hashes in transfer.files:
        data = path.read_bytes()
        assert hashlib.sha256(data).hexdigest() == digest
        pieces = [data[at : at + PIECE_BYTES] for at in range(0, len(data), PIECE_BYTES)]
        assert hashes == b"".join(hashlib.sha256(piece).digest() for piece in pieces)
    assert not list((folder / ".partial").iterdir())
    return transfer


def content(transfer: Transfer) -> bytes:
    return b"".join(path.read_bytes() for path, *_ in transfer.files)


# -- which files -----------------------------------------------------------------------------------


async def test_ollamas_layers_are_files_licence_and_parameters(server: RegistryServer) -> None:
    server.add_ollama(
        "library/tiny:1b",
        WEIGHTS,
        license="Be nice.",
        system="You are a test.",
        template="{{ .Prompt }}",
        params='{"stop": ["<|end|>"], "temperature": 0.5, "num_ctx": 4096, "mirostat": 1, '
        '"top_p": 7, "top_k": 20}',
    )
    listing = await look_up(server, "tiny:1b")
    assert [file.digest for file in listing.files] == [DIGEST]
    assert (listing.record.license, listing.record.system) == ("Be nice.", "You are a test.")
    # An unknown one and one that is out of range are left out.
    expected = ModelParameters(temperature=0.5, top_k=20, num_ctx=4096, stop=("<|end|>",))
    assert listing.record.parameters == expected


async def test_an_adapter_is_refused(server: RegistryServer) -> None:
    server.add_ollama("library/adapter:1b", WEIGHTS, adapter=b"x" * 10)
    with pytest.raises(PullFailed, match="LoRA"):
        await look_up(server, "adapter:1b")


async def test_a_projector_comes_with_its_model(server: RegistryServer, tmp_path: Path) -> None:
    projector = b"GGUF of a projector" * 1000
    server.add_ollama("library/eye:1b", WEIGHTS, projector=projector)
    files = {"m-Q8_0.gguf": WEIGHTS, "mmproj-BF16.gguf": b"B", "mmproj-f16.gguf": projector}
    server.add_hub("ann/eye-GGUF", files)
    for name in ("eye:1b", "hf.co/ann/eye-GGUF:Q8_0"):
        pulled = await pull(server, name, tmp_path)
        assert pulled.size == len(WEIGHTS) + len(projector)
        (_, _, _), (model, digest, _) = pulled.files
        assert digest == pulled.digest == DIGEST
        record = records.read(model)
        assert record is not None
        assert model.with_name(record.projector).read_bytes() == projector
        assert record.projector.startswith("mmproj-")


def test_of_several_projectors_the_model_s_own_is_chosen() -> None:
    names = ["a/mmproj-F16.gguf", "b/mmproj-Q8_0.gguf", "b/m-mmproj-bf16.gguf", "b/m-Q4_0.gguf"]
    assert projectors.choose(names, "b/m-Q4_0.gguf") == "b/m-mmproj-bf16.gguf"
    assert projectors.choose(["m-Q4_0.gguf"], "m-Q4_0.gguf") == ""


@pytest.mark.parametrize(
    "choice, expected",
    [
        ("", ["m-Q4_K_M.gguf"]),
        ("Q8_0", ["big/m-Q8_0-00001-of-00002.gguf", "big/m-Q8_0-00002-of-00002.gguf"]),
        ("q4_0", ["m-Q4_0.gguf"]),
        ("m-Q4_0.gguf", ["m-Q4_0.gguf"]),
        ("Q4_K", []),
        ("F16", []),
    ],
)
def test_a_quantisation_chooses_files_with_all_their_parts(
    choice: str, expected: list[str]
) -> None:
    names = [
        "m-Q4_0.gguf", "m-Q4_K_M.gguf", "big/m-Q8_0-00002-of-00002.gguf", "mmproj-F16.gguf",
        "big/m-Q8_0-00001-of-00002.gguf", "config.json", "m-IQ4_K_M.gguf",
    ]  # fmt: skip
    assert choose(names, choice) == expected


async def test_a_hub_repository_is_pinned_to_its_commit(
    server: RegistryServer, tmp_path: Path
) -> None:
    server.add_hub("ann/tiny-GGUF", {"tiny-Q8_0.gguf": WEIGHTS}, license="mit")
    listing = await look_up(server, "hf.co/ann/tiny-GGUF:Q8_0")
    assert listing.record.license == "mit"
    assert "0123456789ab" in listing.record.source
    transfer = await pull(server, "hf.co/ann/tiny-GGUF:Q8_0", tmp_path)
    assert content(transfer) == WEIGHTS
    with pytest.raises(PullFailed, match=r"It has: tiny-Q8_0\.gguf"):
        await look_up(server, "hf.co/ann/tiny-GGUF:Q2_K")


async def test_a_model_that_is_not_there_is_named(server: RegistryServer) -> None:
    for name in ("tiny:9b", "hf.co/ann/none"):
        with pytest.raises(PullFailed, match="has no model"):
            await look_up(server, name)


async def test_nobody_answers() -> None:
    with registry_server() as gone:
        pass
    async with RegistryClient(gone.url) as client:
        model = RegistryModel("a:b", gone.url, "library/a", "b")
        with pytest.raises(PullFailed, match="cannot be reached"):
            await manifest.of_registry(client, model)


# -- how it comes ----------------------------------------------------------------------------------


async def test_a_file_comes_in_several_connections(server: RegistryServer, tmp_path: Path) -> None:
    big = os.urandom(PIECE_BYTES * 40 + 1)
    server.add_ollama("library/big:1b", big)
    transfer = await pull(server, "big:1b", tmp_path)
    assert content(transfer) == big
    assert transfer.files[0][0] == tmp_path / "big:1b.gguf"
    assert len(server.ranges) == 3


async def test_connections_that_break_are_made_again(
    server: RegistryServer, tmp_path: Path
) -> None:
    server.add_ollama("library/tiny:1b", WEIGHTS)
    server.faults.cuts, server.faults.cut_after = 3, PIECE_BYTES + 100
    server.faults.statuses = [503, 429, 403]
    transfer = await pull(server, "tiny:1b", tmp_path)
    assert content(transfer) == WEIGHTS
    # What came before a connection broke is not asked for again.
    assert f"bytes={PIECE_BYTES}-{len(WEIGHTS) - 1}" in server.ranges


async def test_a_download_that_was_given_up_goes_on_where_it_was(
    server: RegistryServer, tmp_path: Path
) -> None:
    server.add_ollama("library/tiny:1b", WEIGHTS)
    server.faults.pause = threading.Event()
    listing = await look_up(server, "tiny:1b")
    async with RegistryClient(server.url) as client:
        first = Transfer(client, listing, tmp_path)
        running = asyncio.create_task(first.run())
        await wait_until(lambda: first.bytes >= 4 * PIECE_BYTES)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    server.faults.pause.set()
    server.faults.pause = None
    server.ranges.clear()
    # A piece whose bytes have changed on disk meanwhile counts as missing.
    partial = tmp_path / ".partial" / DIGEST
    with partial.open("r+b") as disk:
        disk.write(b"changed")
    transfer = await pull(server, "tiny:1b", tmp_path)
    assert content(transfer) == WEIGHTS
    assert f"bytes=0-{PIECE_BYTES - 1}" in server.ranges
    asked = [tuple(map(int, text.removeprefix("bytes=").split("-"))) for text in server.ranges]
    assert sum(end + 1 - begin for begin, end in asked) <= len(WEIGHTS) - 3 * PIECE_BYTES
    assert not partial.with_name(f"{DIGEST}.pieces").exists()


async def test_a_server_without_ranges_sends_it_whole(
    server: RegistryServer, tmp_path: Path
) -> None:
    big = os.urandom(PIECE_BYTES * 20)
    server.add_ollama("library/big:1b", big)
    server.faults.without_ranges = True
    transfer = await pull(server, "big:1b", tmp_path)
    assert content(transfer) == big


async def test_a_url_tells_size_and_digest_as_it_comes(
    server: RegistryServer, tmp_path: Path
) -> None:
    digest = server.add_blob(WEIGHTS)
    transfer = await pull(server, f"{server.url}/files/{digest}/tiny.gguf", tmp_path)
    assert transfer.digest == digest
    assert content(transfer) == WEIGHTS
    with pytest.raises(PullFailed, match="no file at"):
        await pull(server, f"{server.url}/none/tiny.gguf", tmp_path)


# -- whom it trusts --------------------------------------------------------------------------------


async def test_a_wrong_byte_is_found_and_nothing_of_it_kept(
    server: RegistryServer, tmp_path: Path
) -> None:
    server.add_ollama("library/tiny:1b", WEIGHTS)
    server.faults.wrong_bytes = True
    with pytest.raises(PullFailed, match="another file than its digest"):
        await pull(server, "tiny:1b", tmp_path)
    assert not list((tmp_path / ".partial").iterdir())
    server.faults.wrong_bytes = False
    transfer = await pull(server, "tiny:1b", tmp_path)
    assert content(transfer) == WEIGHTS


@pytest.mark.parametrize("difference", [-PIECE_BYTES, -1, 1, PIECE_BYTES])
async def test_a_wrong_length_is_found(
    server: RegistryServer, tmp_path: Path, difference: int
) -> None:
    server.faults.wrong_size = difference
    server.add_ollama("library/tiny:1b", WEIGHTS)
    with pytest.raises(PullFailed, match="does not send"):
        await pull(server, "tiny:1b", tmp_path)


async def test_a_range_that_was_not_asked_for_is_not_taken(
    server: RegistryServer, tmp_path: Path
) -> None:
    server.add_ollama("library/tiny:1b", WEIGHTS)
    server.faults.wrong_range = True
    with pytest.raises(PullFailed, match="another part"):
        await pull(server, "tiny:1b", tmp_path)


async def test_a_registrys_token_is_fetched_and_stays_with_it(
    server: RegistryServer, tmp_path: Path
) -> None:
    server.add_ollama("library/tiny:1b", WEIGHTS, license="Be nice.")
    server.faults.token = "oci"
    transfer = await pull(server, "tiny:1b", tmp_path)
    assert content(transfer) == WEIGHTS
    sent = {path.split("/")[1]: value for path, value in server.credentials}
    assert sent["v2"] == "Bearer oci"
    assert sent["cas"] == sent["token"] == ""


async def test_the_hubs_token_is_sent_to_the_hub_alone(
    server: RegistryServer, tmp_path: Path
) -> None:
    server.add_hub("ann/gated", {"m-Q8_0.gguf": WEIGHTS})
    server.faults.token = "hf_secret"
    with pytest.raises(PullFailed, match="HF_TOKEN"):
        await look_up(server, "hf.co/ann/gated")
    transfer = await pull(server, "hf.co/ann/gated", tmp_path, "hf_secret")
    assert content(transfer) == WEIGHTS
    sent = {value for path, value in server.credentials if path.startswith("/cas/")}
    assert sent == {""}


async def test_names_of_files_are_quoted_and_parts_must_be_complete(
    server: RegistryServer, tmp_path: Path
) -> None:
    server.add_hub("ann/odd", {"a folder/tiny #1 Q8_0.gguf": WEIGHTS})
    listing = await look_up(server, "hf.co/ann/odd:Q8_0")
    assert listing.files[0].url.endswith("/a%20folder/tiny%20%231%20Q8_0.gguf")
    server.add_hub("ann/half", {"m-Q8_0-00001-of-00002.gguf": WEIGHTS})
    with pytest.raises(PullFailed, match="lacks some of the 2 parts"):
        await look_up(server, "hf.co/ann/half:Q8_0")


async def test_a_description_is_bounded_in_all(server: RegistryServer) -> None:
    server.add_ollama("library/tiny:1b", WEIGHTS, license="x" * 200_000)
    with pytest.raises(PullFailed, match="license: that is too much"):
        await look_up(server, "tiny:1b")


async def test_a_redirect_to_plain_http_is_not_followed() -> None:
    async with RegistryClient("https://registry.example") as client:
        with pytest.raises(PullFailed, match="without TLS"):
            await client.download("http://192.0.2.1/manifest")


# -- where it goes ---------------------------------------------------------------------------------


async def test_a_full_disk_is_said_before_anything_comes(
    server: RegistryServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add_ollama("library/tiny:1b", WEIGHTS)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("", (), {"free": 1000}))
    with pytest.raises(PullFailed, match=r"no room .* MB are free"):
        await pull(server, "tiny:1b", tmp_path)
    assert server.ranges == []


async def test_two_processes_do_not_write_one_file(server: RegistryServer, tmp_path: Path) -> None:
    server.add_ollama("library/tiny:1b", WEIGHTS)
    server.faults.pause = threading.Event()
    first = asyncio.create_task(pull(server, "tiny:1b", tmp_path))
    await wait_until(lambda: bool(server.ranges))
    with pytest.raises(PullFailed, match="another process"):
        await pull(server, "tiny:1b", tmp_path)
    server.faults.pause.set()
    transfer = await first
    assert content(transfer) == WEIGHTS
