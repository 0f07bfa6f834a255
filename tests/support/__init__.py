"""What tests share: boxes, peers, engines, keys and records.  No test is in here."""
