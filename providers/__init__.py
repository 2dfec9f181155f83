"""Adapters to outside systems, one package a system; `ports` declares what they fill.

The same file names in each: client (connection and raw calls), adapter (fills the port), errors (classification),
readiness (findings before a run). A provider imports domain, replication.ports and its own SDK, nothing else.
"""
