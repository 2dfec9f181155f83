"""The data plane: sources → engine → stores, and the formats on disk beside their code.

May use the standard library, codecs (blake3) and `domain`; no Temporal, no provider SDK. `ports` is what others fill
and call, `loop.run_leg` and `engine.run_cycle` make points, `replica` holds the safety argument, `verify` proves
points, `filestore` and `filesource` are the plainest store and source.
"""
