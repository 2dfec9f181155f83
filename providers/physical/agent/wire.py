"""What agent and client say to each other: HTTP/1.1 with JSON over mutual TLS, bytes as octets.

GET    /v1/machine                         what this machine is, its disks, how they are tracked
GET    /v1/status
POST   /v1/cuts                            {"name", "want", "bases": {disk: tracker}} → a cut
GET    /v1/cuts/NAME/changed?disk&since    [[offset, length] …]; `not-known` when only a full comparison helps
GET    /v1/cuts/NAME/held?disk             what the cut keeps
GET    /v1/cuts/NAME/bytes?disk&offset&length    octets; a range of zeros comes without a body and with ZEROS
DELETE /v1/cuts/NAME
POST   /v1/reap                            {"upto"} → names
POST   /v1/seeds                           {} → {"marks": {disk: tracker}}: a barrier for copying in advance
GET    /v1/seeds/changed?disk&since&until
GET    /v1/live?disk&offset&length         octets of the running disk

An error is {"code", "message", "details"} with a status of `STATUS`.
"""

from __future__ import annotations

PROTOCOL = 1
ZEROS = "X-Farshore-Zeros"  # header: this many zeros, no body
LONGEST = 16 << 20  # bytes of one read

STATUS = {
    "bad-request": 400,
    "forbidden": 403,
    "not-found": 404,
    "busy": 409,
    "not-known": 409,
    "gone": 410,
    "overwritten": 410,
    "not-eligible": 422,
    "seed-needed": 413,
    "snapshot-failed": 503,
    "read-failed": 502,
    "internal": 500,
}
"""HTTP status by error code. The code decides; the status is for people with curl."""
