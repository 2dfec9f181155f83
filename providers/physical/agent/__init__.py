"""The agent: a small service on a protected server. `python -m farshore.providers.physical.agent --help`.

config, certificates, service, wire   how it is set up and spoken to
disks         what disks, partitions and mounts this machine has
blocks        sets of 64 KiB blocks
tracking      the port of change tracking, marks and generations
tracing       tracking by the kernel's block trace events
hashing       tracking by hashes, where nothing else can
lvm, dmera    tracking and snapshots by device mapper (thin pools; dm-era)
freeze, watchdog, hooks   barriers that always end
holding, cuts             one instant over all disks, readable until released
windows, shadowed         the same on Windows: shadow copies and hashes (never executed on Windows)

Only the standard library (blake3 is used for hashes when it is there), and nothing of Farshore outside this folder: it
is installed on machines that have nothing else of us. Sizes are bytes, durations seconds.
"""
