"""What `/v1/responses` has stored."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import Any

from tests.support.process_box import Box


def client_with_new_key(here: Box) -> Any:
    made = here.http("POST", "/v1/admin/keys", json={"account": "owner"}).json()
    return here.client_with(made["key"])


def stored_rows(here: Box) -> dict[str, dict[str, Any]]:
    with closing(sqlite3.connect(here.home / "pinaivu.db")) as found:
        found.row_factory = sqlite3.Row
        kept = found.execute("SELECT * FROM response_sums WHERE count > 0")
        sums = {row["key_id"]: (row["count"], row["bytes"]) for row in kept}
        counted = "SELECT stored_by, count(*), sum(bytes) FROM responses GROUP BY 1"
        assert sums == {key: (count, size) for key, count, size in found.execute(counted)}
        return {row["id"]: dict(row) for row in found.execute("SELECT *, bytes FROM responses")}
