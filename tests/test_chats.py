"""Conversations on a running box: they branch, go on without their browser, and are sealed."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.chats import (
    ask,
    conversation,
    events,
    files_with,
    in_database,
    messages,
)
from tests.support.fake_model import FAKE
from tests.support.in_process_command import run_command
from tests.support.pages import PASSWORD, logged_in, make_account
from tests.support.process_box import UNDRAFTED, Box, StartBox, wait_until

SLOW = "fake:20"
EMBEDS = "embed:1"
PICTURE = "data:image/png;base64,iVBORw0KGgo="


@pytest.fixture(scope="module")
def box(module_box: StartBox) -> Box:
    started = module_box(
        *("--model", f"{FAKE}=fake:1", "--model", f"{SLOW}=fake:20"),
        *("--model", f"{EMBEDS}=fake:1"),
        config=UNDRAFTED,
    )
    make_account(started.home, "ada")
    make_account(started.home, "ben")
    return started


@pytest.fixture(scope="module")
def ada(box: Box) -> Iterator[httpx.Client]:
    with logged_in(box.url) as client:
        yield client


@pytest.fixture
def person(box: Box) -> Iterator[Callable[[str], httpx.Client]]:
    """`person(name)`: somebody with an account of their own, logged in."""
    opened = []

    def make(name: str, password: str = PASSWORD) -> httpx.Client:
        made = logged_in(box.url, name, password)
        opened.append(made)
        return made.__enter__()

    yield make
    for one in opened:
        one.__exit__(None, None, None)


def identifiers(client: httpx.Client) -> list[str]:
    """Of all conversations, newest first; titles are left out, since idle time writes them."""
    return [one["id"] for one in client.get("/v1/conversations").json()["data"]]


def test_a_conversation_keeps_what_was_said_and_the_receipt_of_each_answer(
    ada: httpx.Client,
) -> None:
    chat = conversation(ada)
    answer = ask(ada, chat, "What does the fox do?\nTell me.")
    assert answer.get("status", "complete") == "complete"
    assert answer["content"] and answer["completion_tokens"] == 8
    assert answer["tokens_per_second"] > 0
    receipt = ada.get(f"/v1/receipts/{answer['request_id']}")
    assert receipt.status_code == 200
    assert messages(ada, chat)[1] == answer
    shown = ada.get(f"/v1/conversations/{chat}").json()
    assert shown["title"] == "What does the fox do?" and shown["leaf"] == answer["id"]


def test_an_edited_message_and_another_answer_are_branches(ada: httpx.Client) -> None:
    chat = conversation(ada)
    first = ask(ada, chat, "One")
    second = ask(ada, chat, "Two")
    again = ask(ada, chat)
    assert again["parent"] == second["parent"] and again["id"] != second["id"]
    edited = ask(ada, chat, "Another one", parent=None)
    tree = {one["id"]: one for one in messages(ada, chat)}
    assert tree[edited["parent"]]["parent"] is None
    assert len(tree) == 7
    assert ada.get(f"/v1/conversations/{chat}").json()["leaf"] == edited["id"]
    back = ada.patch(f"/v1/conversations/{chat}", json={"leaf": second["id"]}).json()
    assert back["leaf"] == second["id"]
    exported = ada.get(f"/v1/conversations/{chat}/export?format=markdown").text
    assert "Two" in exported and "Another one" not in exported and first["content"] in exported
    assert (
        ada.post(f"/v1/conversations/{chat}/answers", json={"parent": "msg_1"}).status_code == 422
    )


def test_a_reload_in_the_middle_of_an_answer_misses_nothing(ada: httpx.Client) -> None:
    chat = conversation(ada)
    path, text = f"/v1/conversations/{chat}/answers", ""
    body = {"content": "Go on", "max_tokens": 60, "model": SLOW}
    with ada.stream("POST", path, json=body) as response:
        for event in events(response):
            if event["type"] == "started":
                answer = event["answer"]["id"]
            else:
                text, offset = text + event["text"], event["offset"]
                break
    assert messages(ada, chat)[1]["status"] == "running"
    with ada.stream("GET", f"{path}/{answer}", params={"offset": offset}) as response:
        for event in events(response):
            text, last = text + event.get("text", ""), event
    assert last["type"] == "finished" and last["answer"]["completion_tokens"] == 60
    assert text == last["answer"]["content"] == messages(ada, chat)[1]["content"]
    with ada.stream("GET", f"{path}/{answer}", params={"offset": "0.5"}) as response:
        late = "".join(event.get("text", "") for event in events(response))
    assert late == text[5:]


def test_an_answer_is_stopped_and_keeps_what_there_is(ada: httpx.Client) -> None:
    chat = conversation(ada)
    path = f"/v1/conversations/{chat}/answers"
    body = {"content": "Go on for long", "max_tokens": 5000, "model": SLOW}
    with ada.stream("POST", path, json=body) as response:
        for event in events(response):
            if event["type"] == "started":
                answer = event["answer"]["id"]
            elif event["type"] == "delta" and event["text"]:
                stopped = ada.post(f"{path}/{answer}/stop").json()
                break
    assert stopped["stopped"]
    kept = messages(ada, chat)[1]
    assert kept["status"] == "stopped" and kept["content"]
    assert ada.get(f"/v1/receipts/{kept['request_id']}").status_code == 200


def test_what_a_second_session_is_told_comes_from_the_first(box: Box, ada: httpx.Client) -> None:
    before = ask(ada, conversation(ada), "Please remember that my ferret is called Xylophon.")
    (known,) = ada.get("/v1/memories").json()["data"]
    assert known["text"] == "My ferret is called Xylophon"
    with logged_in(box.url) as later:
        chat = conversation(later)
        assert ask(later, chat, "Who is my ferret?")["memories"] == [known["id"]]
        assert "memories" not in ask(later, chat, "What is seven times six?")
        off = conversation(later, memory=False)
        assert "memories" not in ask(later, off, "Who is my ferret?")
        assert later.patch("/v1/memories", json={"enabled": False}).json()["enabled"] is False
        assert "memories" not in ask(later, chat, "Who is my ferret?")
        later.patch("/v1/memories", json={"enabled": True})
        ask(later, chat, "Forget that my ferret is called Xylophon!")
        assert later.get("/v1/memories").json()["data"] == []
    assert before["model"] == FAKE


def test_a_loaded_embedding_model_finds_memories(box: Box, person: Any) -> None:
    make_account(box.home, "jo")
    jo = person("jo")
    memory = jo.post("/v1/memories", json={"text": "My ferret is called Xylophon"}).json()
    assert jo.get("/v1/memories").json()["search"] == "words"
    embeddings = {"model": EMBEDS, "input": "load it"}
    assert jo.post("/v1/embeddings", json=embeddings).status_code == 200
    try:
        assert jo.get("/v1/memories").json()["search"] == "embeddings"
        answer = ask(jo, conversation(jo), memory["text"])
        assert answer["memories"] == [memory["id"]]
        ((vector,),) = in_database(
            box.home, "SELECT vector FROM memories WHERE id = ?", memory["id"]
        )
        assert len(vector) > 100
    finally:
        headers = {"Authorization": f"Bearer {box.key}"}
        unload = f"{box.url}/v1/admin/models/unload"
        assert (
            httpx.post(unload, json={"model": EMBEDS}, headers=headers, timeout=60).status_code
            == 200
        )


def test_memories_are_added_edited_and_deleted(ada: httpx.Client) -> None:
    added = ada.post("/v1/memories", json={"text": "I  like\ntea"}).json()
    assert added["text"] == "I like tea"
    assert ada.post("/v1/memories", json={"text": "i like tea."}).json()["id"] == added["id"]
    changed = ada.patch(f"/v1/memories/{added['id']}", json={"text": "I like coffee"}).json()
    assert ada.get("/v1/memories").json()["data"] == [changed]
    assert ada.delete(f"/v1/memories/{added['id']}").json()["deleted"]
    assert ada.delete(f"/v1/memories/{added['id']}").status_code == 404


def test_nobody_finds_what_another_account_has(ada: httpx.Client, person: Any) -> None:
    chat = conversation(ada)
    answer = ask(ada, chat, "Mine")
    memory = ada.post("/v1/memories", json={"text": "A memory of mine"}).json()["id"]
    ben, path = person("ben"), f"/v1/conversations/{chat}"
    asked = [
        ben.get(path),
        ben.get(f"{path}/messages"),
        ben.get(f"{path}/export"),
        ben.get(f"{path}/answers/{answer['id']}"),
        ben.post(f"{path}/answers/{answer['id']}/stop"),
        ben.post(f"{path}/answers", json={"content": "Hi"}),
        ben.patch(path, json={"title": "Ours"}),
        ben.delete(path),
        ben.patch(f"/v1/memories/{memory}", json={"text": "Ours"}),
        ben.delete(f"/v1/memories/{memory}"),
    ]
    assert {one.status_code for one in asked} == {404}
    assert ben.get("/v1/conversations").json()["data"] == []
    ada.delete(f"/v1/memories/{memory}")


def test_conversations_are_listed_by_pages_and_searched(person: Any, box: Box) -> None:
    make_account(box.home, "cleo")
    cleo = person("cleo")
    ids = [conversation(cleo, title=f"Number {n}") for n in range(5)]
    ask(cleo, ids[1], "A word that is rare: Schwertfisch")
    seen, after = [], ""
    while after is not None:
        page = cleo.get("/v1/conversations", params={"limit": 2, "after": after}).json()
        seen += [one["id"] for one in page["data"]]
        after = page["next"]
    assert seen == [ids[1], *[one for one in reversed(ids) if one != ids[1]]]

    def found(text: str) -> list[str]:
        data = cleo.get("/v1/conversations", params={"search": text}).json()["data"]
        return [one["id"] for one in data]

    assert found("schwertfisch rare") == [ids[1]] and found("number 3") == [ids[3]]
    assert found("nothing such") == []
    assert cleo.get("/v1/conversations", params={"after": "x"}).status_code == 409


def test_an_import_brings_back_what_was_exported(ada: httpx.Client, person: Any, box: Box) -> None:
    make_account(box.home, "dora")
    dora = person("dora")
    chat = conversation(ada, title="To take along", system="Be brief")
    file = {"name": "a.py", "text": "print('```')"}
    ask(ada, chat, "Read this", files=[file])
    ask(ada, chat)
    exported = ada.get(f"/v1/conversations/{chat}/export").content
    counts = dora.post("/v1/conversations/import", content=exported).json()
    assert counts == {"conversations": 1, "messages": 3, "memories": 0}
    (taken,) = dora.get("/v1/conversations").json()["data"]
    assert (taken["title"], taken["system"]) == ("To take along", "Be brief")
    contents = [one["content"] for one in messages(dora, taken["id"])]
    assert contents == [one["content"] for one in messages(ada, chat)]
    assert messages(dora, taken["id"])[0]["files"] == [file]
    assert dora.get("/v1/conversations/export").json()["format"] == "pinaivu-chats"


def test_a_chat_in_markdown_is_imported_again(ada: httpx.Client, person: Any, box: Box) -> None:
    make_account(box.home, "dana")
    dana = person("dana")
    file = {"name": "a.py", "text": "## You\nprint('```')"}
    chat = conversation(ada, title="To read", system="Be brief\n\nand kind", memory=False)
    first = ask(ada, chat, "Read this\n\n## Assistant\nfor me", files=[file])
    ask(ada, chat)  # a branch
    ada.patch(f"/v1/conversations/{chat}", json={"leaf": first["id"]}).raise_for_status()
    exported = ada.get(f"/v1/conversations/{chat}/export?format=markdown").content
    path, headers = "/v1/conversations/import", {"content-type": "text/markdown; charset=utf-8"}
    counts = dana.post(path, content=exported, headers=headers).json()
    assert counts == {"conversations": 1, "messages": 2, "memories": 0}
    (taken,) = dana.get("/v1/conversations").json()["data"]
    told = ("title", "system", "model", "memory")
    before = ada.get(f"/v1/conversations/{chat}").json()
    assert [taken[name] for name in told] == [before[name] for name in told]
    question, answer = messages(dana, taken["id"])
    assert question["content"] == "Read this\n\n## Assistant\nfor me"
    assert question["files"] == [file]
    assert (answer["content"], answer["model"]) == (first["content"].strip("\n"), FAKE)
    again = dana.get(f"/v1/conversations/{taken['id']}/export?format=markdown").content
    assert again == exported

    large = b"# Large\n\n## You\n\n" + b"word " * 100_000 + b"\n\n## Assistant\n\nYes.\n"
    assert dana.post(path, content=large, headers=headers).json()["messages"] == 2
    refused = dana.post(path, content=b"# No chat\n", headers=headers)
    assert refused.status_code == 422 and "## You" in refused.text


def test_an_account_imports_one_file_at_a_time(box: Box, person: Any) -> None:
    make_account(box.home, "dirk")
    dirk = person("dirk")
    conversation(dirk)
    exported = dirk.get("/v1/conversations/export").content
    path = "/v1/conversations/import"
    # Who imports first waits for the database, so that the other one comes in between.
    lock = sqlite3.connect(box.home / "pinaivu.db", timeout=30, isolation_level=None)
    with ThreadPoolExecutor(2) as threads:
        lock.execute("BEGIN IMMEDIATE")
        try:
            sent = [threads.submit(dirk.post, path, content=exported) for _ in range(2)]
            done, _ = wait(sent, return_when=FIRST_COMPLETED)
        finally:
            lock.execute("ROLLBACK")
            lock.close()
        (refused,) = [one.result() for one in done]
        answers = sorted(one.result().status_code for one in sent)
    assert refused.status_code == 409 and "Another import" in refused.text
    assert answers == [200, 409]
    assert dirk.post(path, content=exported).status_code == 200


def test_a_long_conversation_goes_on_without_its_beginning(ada: httpx.Client) -> None:
    long = [
        message(id=f"m{n}", parent=f"m{n - 1}" if n else None, role=role, content="word " * 5000)
        for n, role in enumerate(["user", "assistant"] * 4)
    ]
    file = {"title": "Long", "model": FAKE, "messages": long}
    exported = {"format": "pinaivu-chats", "version": 1, "conversations": [file]}
    assert ada.post("/v1/conversations/import", json=exported).status_code == 200
    chat = ada.get("/v1/conversations", params={"search": "Long"}).json()["data"][0]["id"]
    answer = ask(ada, chat, "And now?")
    assert answer["completion_tokens"] == 8 and len(messages(ada, chat)) == 10
    ada.delete(f"/v1/conversations/{chat}")


def message(**fields: Any) -> dict[str, Any]:
    return {"id": "a", "role": "user", "content": "x", **fields}


@pytest.mark.parametrize(
    "conversations",
    [
        [{"title": "t", "messages": [message(parent="a")]}],
        [{"title": "t", "messages": [message(parent="b"), message(id="b", parent="a")]}],
        [{"title": "t", "messages": [message(parent="gone")]}],
        [{"title": "t", "messages": [message(), message()]}],
        [{"title": "t", "messages": [message()], "leaf": "gone"}],
        [{"title": "t" * 201, "messages": []}],
        [{"title": "t", "messages": [message(role="system")]}],
        [{"title": "t", "messages": [message(images=["http://elsewhere/a.png"])]}],
        [{"title": "t", "messages": [message(images=["javascript:alert(1)"])]}],
        [{"title": "t", "messages": [message(created_at=-1)]}],
        {"title": "t"},
        None,
    ],
)
def test_an_import_that_is_no_export_is_refused_whole(
    ada: httpx.Client, conversations: Any
) -> None:
    before = identifiers(ada)
    fine = {"title": "fine", "messages": [message()]}
    if isinstance(conversations, list):
        conversations = [fine, *conversations]
    file = {"format": "pinaivu-chats", "version": 1, "conversations": conversations}
    assert ada.post("/v1/conversations/import", json=file).status_code == 422
    assert identifiers(ada) == before


def test_a_request_that_is_refused_leaves_no_message(ada: httpx.Client) -> None:
    chat = conversation(ada)
    path = f"/v1/conversations/{chat}/answers"
    assert ada.post(path, json={"content": "Hi", "model": "no:such"}).status_code == 404
    assert ada.post(path, json={"content": "Look", "images": [PICTURE]}).status_code == 422
    assert ada.post(path, json={}).status_code == 409
    assert messages(ada, chat) == []


def test_whoever_steals_the_home_reads_no_chat(box: Box, ada: httpx.Client) -> None:
    chat = conversation(ada, system="Instruction Quastenflosser")
    answer = ask(ada, chat, "Remember that my secret is Zwetschgenknödel.", max_tokens=60)
    ada.patch(f"/v1/conversations/{chat}", json={"title": "Title Rhabarberkuchen"})
    ada.post("/v1/memories", json={"text": "I live in Oberammergau"})
    known = ("Quastenflosser", "Zwetschgenknödel", "Rhabarberkuchen", "Oberammergau", "lazy dog")
    assert "lazy dog" in answer["content"]
    assert files_with(box.home, *known) == []
    assert not [word for word in known if word in box.output + box.errors]
    (row,) = in_database(box.home, "SELECT count(*) FROM messages WHERE id = ?", answer["id"])
    assert row == (1,)


def swap(home: Path, one: str, other: str) -> None:
    """Put each of two messages in the other's place."""
    read, write = "SELECT sealed FROM messages WHERE id = ?", "UPDATE messages SET sealed = ?"
    ((first,),), ((second,),) = in_database(home, read, one), in_database(home, read, other)
    in_database(home, f"{write} WHERE id = ?", second, one)
    in_database(home, f"{write} WHERE id = ?", first, other)


def test_a_row_in_the_place_of_another_is_refused(box: Box, ada: httpx.Client) -> None:
    chat = conversation(ada)
    answers = [ask(ada, chat, "One"), ask(ada, chat, "Two")]
    ids = [answer["id"] for answer in answers]
    swap(box.home, *ids)
    refused = ada.get(f"/v1/conversations/{chat}/messages")
    assert refused.status_code == 500 and "not what was sealed" in refused.text
    swap(box.home, *ids)
    assert len(messages(ada, chat)) == 4
    in_database(box.home, "UPDATE messages SET parent_id = NULL WHERE id = ?", answers[1]["parent"])
    assert ada.get(f"/v1/conversations/{chat}/messages").status_code == 500


def test_a_restart_locks_the_chats_and_keeps_what_was_answered_so_far(
    new_box: Callable[..., Box],
) -> None:
    box = new_box("--model", f"{SLOW}=fake:20", config=UNDRAFTED)
    make_account(box.home)
    with logged_in(box.url) as ada:
        chat = conversation(ada, model=SLOW)
        path = f"/v1/conversations/{chat}/answers"
        body = {"content": "Go on", "max_tokens": 5000}
        with ada.stream("POST", path, json=body) as response:
            next(events(response))
        size = "SELECT length(sealed) FROM messages WHERE parent_id IS NOT NULL"
        (before,) = in_database(box.home, size)
        wait_until(lambda: in_database(box.home, size) != [before], "what there is to be saved")
        box.kill()
        box.start()
        ada.base_url = httpx.URL(box.url)
        assert ada.get("/v1/conversations").json()["error"]["code"] == "locked"
        assert ada.post("/v1/account/unlock", json={"secret": "a guess"}).status_code == 403
        state = ada.post("/v1/account/unlock", json={"secret": PASSWORD}).json()
        assert state["unlocked"] and state["sealed"] == "password"
        kept = messages(ada, chat)[1]
        assert kept["status"] == "interrupted" and kept["content"]


def test_a_reset_password_leaves_the_chats_to_the_recovery_key(box: Box, person: Any) -> None:
    make_account(box.home, "emil")
    emil = person("emil")
    chat = conversation(emil, title="Kept")
    recovery = emil.post("/v1/account/recovery-key", json={}).json()["recovery_key"]
    new = "another password"
    run_command("accounts", "passwd", "emil", "--password-stdin", home=box.home, input=f"{new}\n")
    emil = person("emil", new)
    state = emil.get("/v1/account/sealed").json()
    told = {"sealed": "password", "unlocked": False, "recovery_key": True, "lost": True}
    assert state == {**told, "offer_recovery_key": False}
    assert emil.get("/v1/conversations").status_code == 403
    assert emil.post("/v1/account/unlock", json={"secret": recovery.lower()}).status_code == 200
    assert emil.get(f"/v1/conversations/{chat}").json()["title"] == "Kept"
    sealed = {"sealed": "password", "password": new}
    assert emil.post("/v1/account/sealed", json=sealed).json()["lost"] is False
    assert person("emil", new).get(f"/v1/conversations/{chat}").json()["title"] == "Kept"


def test_a_recovery_key_is_offered_once(box: Box, person: Any) -> None:
    def offered(client: httpx.Client) -> bool:
        state: dict[str, bool] = client.get("/v1/account/sealed").json()
        shown = 'id="recovery-offer"' in client.get("/chat").text
        assert shown is state["offer_recovery_key"]
        return shown

    make_account(box.home, "olga")
    make_account(box.home, "otto")
    olga, otto = person("olga"), person("otto")
    assert offered(olga) and offered(otto)
    declined = olga.post("/v1/account/recovery-key/decline")
    assert declined.json()["offer_recovery_key"] is False
    assert not offered(olga) and not offered(person("olga")) and offered(otto)
    assert "Make a recovery key" in olga.get("/account").text  # it can still be made
    assert otto.post("/v1/account/recovery-key", json={}).status_code == 200
    assert not offered(otto)
    otto.patch("/v1/memories", json={"enabled": False}).raise_for_status()
    olga.patch("/v1/memories", json={"enabled": False}).raise_for_status()
    assert not offered(olga)  # settings of the same row
    unsealed = {"sealed": "none"}
    assert olga.post("/v1/account/sealed", json=unsealed).json()["offer_recovery_key"] is False


def test_a_changed_password_opens_the_same_chats(box: Box, person: Any) -> None:
    make_account(box.home, "ida")
    ida = person("ida")
    chat = conversation(ida, title="Kept")
    changed = {"current": PASSWORD, "new": "another password"}
    assert ida.post("/v1/account/password", json=changed).status_code == 200
    assert ida.get(f"/v1/conversations/{chat}").json()["title"] == "Kept"
    again = person("ida", "another password")
    assert again.get(f"/v1/conversations/{chat}").json()["title"] == "Kept"


def test_an_account_chooses_a_passphrase_or_leaves_its_chats_unsealed(
    box: Box, person: Any
) -> None:
    make_account(box.home, "fay")
    fay = person("fay")
    chat = conversation(fay, title="Kept")
    path, seal = f"/v1/conversations/{chat}", "/v1/account/sealed"
    assert fay.post(seal, json={"sealed": "passphrase"}).status_code == 422
    phrase = {"sealed": "passphrase", "passphrase": "a longer phrase"}
    assert fay.post(seal, json=phrase).json()["sealed"] == "passphrase"
    later = person("fay")
    assert later.get(path).status_code == 403
    assert later.post("/v1/account/unlock", json={"secret": "a longer phrase"}).status_code == 200
    assert later.get(path).status_code == 200
    assert later.post(seal, json={"sealed": "none"}).json()["sealed"] == "none"
    assert person("fay").get(path).json()["title"] == "Kept"
    wrong = {"sealed": "password", "password": "not that"}
    assert later.post(seal, json=wrong).status_code == 403
    assert later.post(seal, json={**wrong, "password": PASSWORD}).json()["sealed"] == "password"
    of_fay = "account_id = (SELECT id FROM accounts WHERE name = 'fay')"
    kinds = in_database(box.home, f"SELECT kind FROM account_secrets WHERE {of_fay}")
    assert ("password",) in kinds and ("none",) not in kinds


def test_chats_that_nobody_can_open_are_deleted_on_request(box: Box, person: Any) -> None:
    make_account(box.home, "gus")
    conversation(person("gus"))
    make_account(box.home, "gus", password="another password")
    gus = person("gus", "another password")
    assert gus.post("/v1/account/start-anew", json={"delete_everything": True}).status_code == 200
    assert gus.get("/v1/conversations").json()["error"]["code"] == "seal_not_chosen"
    unsealed = {"sealed": "none"}
    assert gus.post("/v1/account/sealed", json=unsealed).json()["sealed"] == "none"
    assert gus.get("/v1/conversations").json()["data"] == []


def test_an_old_login_needs_a_secret_to_change_what_opens_the_chats(box: Box, person: Any) -> None:
    account = make_account(box.home, "kim")
    kim = person("kim")
    conversation(kim)
    hour = 3_600_000
    in_database(
        box.home, "UPDATE sessions SET created_at = created_at - ? WHERE account_id = ?",
        hour, account,
    )  # fmt: skip
    recovery, seal = "/v1/account/recovery-key", "/v1/account/sealed"
    phrase = {"sealed": "passphrase", "passphrase": "a longer phrase"}
    changes: list[tuple[str, dict[str, Any]]] = [
        (recovery, {}), (seal, phrase), (seal, {"sealed": "none"})
    ]  # fmt: skip
    for path, body in changes:
        assert kim.post(path, json=body).json()["error"]["code"] == "wrong_secret"
    assert kim.post(recovery, json={"secret": "wrong"}).status_code == 403
    key = kim.post(recovery, json={"secret": PASSWORD}).json()["recovery_key"]
    assert kim.post(seal, json={**phrase, "secret": key}).json()["sealed"] == "passphrase"
    unsealed = {"sealed": "none", "secret": "a longer phrase"}
    assert kim.post(seal, json=unsealed).json()["sealed"] == "none"


def test_whoever_starts_anew_takes_the_old_key_from_all_other_sessions(
    box: Box, person: Any
) -> None:
    make_account(box.home, "gia")
    first = person("gia")
    conversation(first)
    phrase = {"sealed": "passphrase", "passphrase": "a longer phrase"}
    assert first.post("/v1/account/sealed", json=phrase).status_code == 200
    second = person("gia")
    anew = {"delete_everything": True}
    assert second.post("/v1/account/start-anew", json=anew).json()["sealed"] is None
    assert first.get("/v1/conversations").status_code == 401
    refused = second.post("/v1/account/start-anew", json=anew)
    assert refused.status_code == 409 and "nothing to delete" in refused.text


def test_one_message_adds_and_deletes_a_few_memories_only(person: Any, box: Box) -> None:
    make_account(box.home, "max")
    ada = person("max")
    chat = conversation(ada)
    many = "\n".join(f"Remember that my number {number} is {number}." for number in range(50))
    ask(ada, chat, many)
    assert len(ada.get("/v1/memories").json()["data"]) == 10
    ask(ada, chat, "Forget that number 3.\nForget that number 4.")
    assert len(ada.get("/v1/memories").json()["data"]) == 8


@pytest.mark.parametrize("how", ["endpoint", "command"])
def test_an_erased_account_leaves_its_sums_and_none_of_its_words(
    box: Box, person: Any, how: str
) -> None:
    name = f"hildegard.{how}"
    account = make_account(box.home, name)
    hilde = person(name)
    answer = ask(hilde, conversation(hilde), "Remember that my cat is Kasimir the Third.")
    response = {"model": FAKE, "input": "A stored Wolpertinger", "max_output_tokens": 2}
    assert hilde.post("/v1/responses", json=response).status_code == 200
    assert files_with(box.home, "Wolpertinger") != []
    if how == "command":
        run_command("accounts", "erase", name, "--yes", home=box.home)
    else:
        erase = "/v1/account/erase"
        assert hilde.post(erase, json={"name": name, "password": "wrong"}).status_code == 403
        assert hilde.post(erase, json={"name": "other", "password": PASSWORD}).status_code == 422
        erased = hilde.post(erase, json={"name": name, "password": PASSWORD}).json()
        assert (erased["conversations"], erased["memories"], erased["responses"]) == (1, 1, 1)
    assert files_with(box.home, "Kasimir", "Wolpertinger", name) == []
    for table in ("messages", "conversations", "memories", "account_secrets", "responses"):
        count = f"SELECT count(*) FROM {table} WHERE account_id = ?"
        assert in_database(box.home, count, account) == [(0,)]
    kept = "SELECT count(*) FROM receipts WHERE account_id = ? AND request_id = ?"
    assert in_database(box.home, kept, account, answer["request_id"]) == [(1,)]
    assert (
        in_database(
            box.home, "SELECT id FROM keys WHERE name = 'pages' AND account_id = ?", account
        )
        == []
    )
    assert hilde.get("/v1/conversations").status_code == 401
    login = {"name": name, "password": PASSWORD}
    assert httpx.post(f"{box.url}/v1/session", json=login, timeout=60).status_code == 401


def test_an_account_is_erased_while_it_is_answered(box: Box, person: Any) -> None:
    name = "wanda"
    account = make_account(box.home, name)
    wanda = person(name)
    path = f"/v1/conversations/{conversation(wanda, model=SLOW)}/answers"
    stop = None
    with wanda.stream("POST", path, json={"content": "Go on", "max_tokens": 5000}) as response:
        for event in events(response):
            if event["type"] == "started":
                stop = f"{path}/{event['answer']['id']}/stop"
            elif event["type"] == "delta":
                break
        with ThreadPoolExecutor(1) as thread:
            stopping = thread.submit(wanda.post, stop)  # at the same time
            erased = wanda.post("/v1/account/erase", json={"name": name, "password": PASSWORD})
            assert stopping.result().status_code in (200, 401, 404)
    assert erased.json()["conversations"] == 1
    for table in ("messages", "conversations", "memories", "account_secrets"):
        count = f"SELECT count(*) FROM {table} WHERE account_id = ?"
        assert in_database(box.home, count, account) == [(0,)]
    sums = "SELECT conversations, bytes FROM chat_sums WHERE account_id = ?"
    assert in_database(box.home, sums, account) == [(0, 0)]
    assert files_with(box.home, name) == []
