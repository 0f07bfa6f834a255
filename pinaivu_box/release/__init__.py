"""Releases: the digests of their files, who signed them, and where they are published."""
