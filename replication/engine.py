"""What the rooms above use of the engine. How it works: `journal`, and there `cycle`."""

from farshore.replication.barrier import (
    BarrierMissed,
    BarrierSource,
    CommonCut,
    Member,
    PreparedCut,
    cut_together,
)
from farshore.replication.groups import Groups
from farshore.replication.journal.audit import Audited
from farshore.replication.journal.bandwidth import Bandwidth, Priority, Schedule, Window
from farshore.replication.journal.cycle import CycleResult, Pace, Stopped, never, run_cycle, utc_now
from farshore.replication.journal.entries import Manifest
from farshore.replication.journal.gather import Gather
from farshore.replication.journal.groups import GroupPoint, MemberPoint
from farshore.replication.journal.keys import Kek, LocalKek
from farshore.replication.journal.reader import PointReader
from farshore.replication.journal.store import JournalStore, Options
from farshore.replication.journal.writer import Writer

__all__ = [
    "Audited",
    "Bandwidth",
    "BarrierMissed",
    "BarrierSource",
    "CommonCut",
    "CycleResult",
    "Gather",
    "GroupPoint",
    "Groups",
    "JournalStore",
    "Kek",
    "LocalKek",
    "Manifest",
    "Member",
    "MemberPoint",
    "Options",
    "Pace",
    "PointReader",
    "PreparedCut",
    "Priority",
    "Schedule",
    "Stopped",
    "Window",
    "Writer",
    "cut_together",
    "never",
    "run_cycle",
    "utc_now",
]
