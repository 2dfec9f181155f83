"""The journal engine: every recovery point out of three layers, none of them trusted without proof.

    L0  journal   immutable segments of encrypted chunks, one log entry a cycle            `segment`, `entries`, `log`
    L1  replica   one image a disk, advanced by redo of the journal, and its leaf table    `mirror`
    L2  bases     frozen states of L1, named by log entries of their own                   `mirror`

A point is the nearest older base on its line of ancestors (or nothing: zeros) and the journal since (`compose`).
`cycle` makes points, `writer` holds the right to make them, `reader` gives their bytes back, `prune` and `scrub` keep
the store small and honest; `groups` ties points of several machines together. Formats are documented beside the code that writes them.

May import the standard library, blake3, zstandard, cryptography, `domain` and the modules of this room.
"""
