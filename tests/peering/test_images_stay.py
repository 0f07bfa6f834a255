"""Images are sent to no other box: only the one that was asked looks at them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pinaivu_box.errors import NoNodesAvailable
from pinaivu_box.legs.codec import to_task
from tests.support.in_process_pools import config, pools

pytestmark = pytest.mark.anyio
DIGEST = "a" * 64
SEEN = [{"role": "user", "content": [{"type": "image", "sha256": DIGEST}]}]


async def test_peers_are_no_candidates_for_a_request_with_images() -> None:
    async with pools(a=config("fake:1=1", policy="balance"), b=config("fake:1=1")) as (
        asked,
        other,
    ):
        text = asked.job()
        seen = replace(text, messages=SEEN, images={DIGEST: b"..."})
        candidates = asked.pool.candidates
        assert [each.refuses for each in candidates.of(text, "")] == [None, None]
        here, there = candidates.of(seen, "")
        assert (here.node_id, here.refuses) == (asked.node_id, None)
        assert there.node_id == other.node_id and "no images" in (there.refuses or "")
        with pytest.raises(NoNodesAvailable, match="only the box that was asked"):
            to_task(seen)
