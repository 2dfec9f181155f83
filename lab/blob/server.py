"""Placeholder head; see BlobServer."""
from __future__ import annotations
