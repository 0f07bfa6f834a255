"""Pinaivu Box: a verified, OpenAI-compatible inference service in one executable."""

__version__ = "0.1.0"
