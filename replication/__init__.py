"""The data plane: sources → engine → stores, and the formats on disk beside their code.

May use the standard library, codecs (blake3, zstandard), cryptography and `domain`; no Temporal, no provider SDK. `ports` is
what others fill and call, `backend` what a place has to promise. `loop.run_leg` and `engine.run_cycle` make points, `journal`
holds formats and the safety argument, `verify` proves points, `filestore` and `filesource` are the plainest store and source,
`python -m farshore.replication` the command line.
"""
