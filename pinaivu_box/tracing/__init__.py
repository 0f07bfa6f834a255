"""Spans of requests, sent to a collector by OTLP over HTTP.

The program writes OTLP's JSON encoding itself.  OpenTelemetry's SDK would bring protobuf, requests
and a thread, for spans that are all made at the end of a request from what is recorded of it
anyway; and its exporter does not say how many spans it has dropped.
"""
