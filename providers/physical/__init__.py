"""Physical (or any) servers as a source: an agent inside the protected machine, and the client of a worker.

agent/      the installable service: change tracking, barriers, frozen bytes; standard library only, imports nothing of us
client      one agent over mutual TLS: calls, resilient ranged reads
settings    how to reach it
source      cuts, resync rules, reads: fills `replication.ports.Source`
seed        the first copy of a disk without a snapshot device, on the worker's side
readiness   which machines and disks qualify, as findings
adapter     `PhysicalSite`: fills `providers.ports.SourceSite`
errors      every failure becomes a FarshoreError of the catalogue

May import domain, replication.ports and providers.ports. Nothing is imported here: the agent must stay light.
"""
