"""Whatever is written, cleared, snapshotted, resized, copied, deleted and restarted: bytes, ranges and differences
equal those of a model in memory that knows nothing of chunks, slots or generations."""

from __future__ import annotations

import inspect
import shutil
import tempfile
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from farshore.lab.blob import pages
from farshore.lab.blob.errors import StorageError
from farshore.lab.blob.store import BlobStore

PAGE = 512
MAX_PAGES = 420  # three chunks of 128 pages and a bit
C, NAME = "disks", "d"


@dataclass
class Image:
    """Pages that hold data, by number."""

    pages: int
    data: dict[int, bytes] = field(default_factory=dict)

    def bytes(self) -> bytes:
        return b"".join(self.data.get(i, bytes(PAGE)) for i in range(self.pages))

    def copy(self) -> Image:
        return Image(self.pages, dict(self.data))


@dataclass
class Snap:
    id: str
    image: Image
    life: int
    touched_since: dict[str, set[int]]  # earlier snapshot -> pages written between it and this one


def runs(pages: set[int]) -> list[tuple[int, int]]:
    out: list[list[int]] = []
    for p in sorted(pages):
        if out and out[-1][1] == p:
            out[-1][1] = p + 1
        else:
            out.append([p, p + 1])
    return [(a * PAGE, b * PAGE) for a, b in out]


def difference(then: Image, now: Image, touched: set[int]) -> list[tuple[int, int, bool]]:
    changed = {p for p in touched if p in now.data}
    cleared = {p for p in then.data if p not in now.data and p < now.pages}
    return sorted([(a, b, False) for a, b in runs(changed)] + [(a, b, True) for a, b in runs(cleared)])


@st.composite
def spans(draw, pages: int) -> tuple[int, int]:
    """A range of pages; often a whole chunk, a few pages, or everything, as the interesting cases are there."""
    kind = draw(st.sampled_from(["chunk", "few", "any", "all"]))
    if kind == "all":
        return 0, pages
    if kind == "chunk":
        chunk = draw(st.integers(0, (pages - 1) // 128))
        return chunk * 128, min(pages, chunk * 128 + 128)
    start = draw(st.integers(0, pages - 1))
    return start, draw(st.integers(start + 1, min(pages, start + 4) if kind == "few" else pages))


class PageBlobs(RuleBasedStateMachine):
    @initialize(pages=st.integers(1, MAX_PAGES))
    def start(self, pages: int) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="farshore-model-"))
        self.store = BlobStore(self.root, "acc", "a2V5")
        self.store.create_container(C)
        self.store.put_page_blob(C, NAME, pages * PAGE)
        self.base = Image(pages)
        self.life = 0  # Put Blob begins another life; differences do not reach across
        self.snaps: list[Snap] = []
        self.touched: dict[str, set[int]] = {}
        self.count = 0

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.root)

    @precondition(lambda self: self.base.pages > 0)
    @rule(data=st.data())
    def write(self, data) -> None:
        self.put(*data.draw(spans(self.base.pages)))

    @precondition(lambda self: self.base.pages > 0)
    @rule(data=st.data())
    def write_one_page_and_maybe_snapshot(self, data) -> None:
        page = data.draw(st.integers(0, min(self.base.pages, 8) - 1))
        self.put(page, page + 1)
        if data.draw(st.booleans()):
            self.snapshot()

    def put(self, start: int, end: int) -> None:
        length = end - start
        self.count += 1
        body = b"".join(self.count.to_bytes(4, "big") * 127 + p.to_bytes(4, "big") for p in range(length))
        self.store.put_pages(C, NAME, start * PAGE, body)
        for i in range(length):
            self.base.data[start + i] = body[i * PAGE : (i + 1) * PAGE]
            for touched in self.touched.values():
                touched.add(start + i)

    @precondition(lambda self: self.base.pages > 0)
    @rule(data=st.data())
    def clear(self, data) -> None:
        start, end = data.draw(spans(self.base.pages))
        self.store.clear_pages(C, NAME, start * PAGE, end * PAGE)
        for p in range(start, end):
            self.base.data.pop(p, None)

    @rule()
    def snapshot(self) -> None:
        taken = self.store.snapshot(C, NAME).snapshot
        self.snaps.append(
            Snap(taken, self.base.copy(), self.life, {k: set(v) for k, v in self.touched.items()})
        )
        self.touched[taken] = set()

    @precondition(lambda self: self.count > 2)
    @rule(pages=st.integers(0, MAX_PAGES))
    def resize(self, pages: int) -> None:
        self.store.set_properties(C, NAME, props=None, size=pages * PAGE)
        self.base.pages = pages
        self.base.data = {p: d for p, d in self.base.data.items() if p < pages}

    @precondition(lambda self: len(self.snaps) > 1)
    @rule(data=st.data())
    def delete_snapshot(self, data) -> None:
        snap = self.snaps.pop(data.draw(st.integers(0, len(self.snaps) - 1)))
        self.store.delete(C, NAME, snap.id)
        self.touched.pop(snap.id, None)

    @precondition(lambda self: len(self.snaps) > 2)
    @rule()
    def delete_all_snapshots(self) -> None:
        self.store.delete(C, NAME, snapshots="only")
        self.snaps, self.touched = [], {}

    @precondition(lambda self: len(self.snaps) > 1)
    @rule(data=st.data())
    def die_between_a_row_and_its_bytes(self, data) -> None:
        snap = self.snaps.pop(data.draw(st.integers(0, len(self.snaps) - 1)))
        self.touched.pop(snap.id, None)
        self.store.catalog.delete_blob(self.store.need_blob(C, NAME, snap.id))
        self.restart()

    @precondition(lambda self: self.count > 4 * (self.life + 1))  # seldom: it ends all differences
    @rule(pages=st.integers(0, MAX_PAGES))
    def overwrite(self, pages: int) -> None:
        self.store.put_page_blob(C, NAME, pages * PAGE)
        self.base = Image(pages)
        self.life += 1
        self.touched = {}

    @rule(data=st.data())
    def copy(self, data) -> None:
        which = data.draw(st.integers(-1, len(self.snaps) - 1))
        image = self.base if which < 0 else self.snaps[which].image
        source = (C, NAME, "" if which < 0 else self.snaps[which].id)
        self.store.start_copy(C, "copy", self.store, source, "url")
        for _ in range(10_000):
            row = self.store.get(C, "copy")
            if row.copy is not None and row.copy.status != "pending":
                break
            self.store.closed.wait(0.001)
        assert row.copy is not None and row.copy.status == "success"
        self.check("copy", "", image)

    @rule()
    def restart(self) -> None:
        self.store.close()
        self.store = BlobStore(self.root, "acc", "a2V5")

    @rule(data=st.data())
    def read_a_part(self, data) -> None:
        whole = self.base.bytes()
        start = data.draw(st.integers(0, len(whole)))
        length = data.draw(st.integers(0, len(whole) - start))
        assert self.store.open(C, NAME).read(start, length) == whole[start : start + length]

    @invariant()
    def everything_equals_the_model(self) -> None:
        self.check(NAME, "", self.base)
        for snap in self.snaps:
            self.check(NAME, snap.id, snap.image)

    @invariant()
    def differences_equal_the_model(self) -> None:
        for snap in self.snaps:
            if snap.life == self.life:
                expected = difference(snap.image, self.base, self.touched[snap.id])
                assert self.diff("", snap.id) == expected
            else:
                with pytest.raises(StorageError, match="BlobOverwritten"):
                    self.diff("", snap.id)
            for earlier in self.snaps:
                if earlier.id < snap.id and earlier.life == snap.life:
                    expected = difference(earlier.image, snap.image, snap.touched_since[earlier.id])
                    assert self.diff(snap.id, earlier.id) == expected

    def diff(self, snapshot: str, prev: str) -> list[tuple[int, int, bool]]:
        return [tuple(r) for r in self.store.page_ranges(C, NAME, snapshot, prev=prev)[1]]

    def check(self, name: str, snapshot: str, image: Image) -> None:
        view = self.store.open(C, name, snapshot)
        assert view.size == image.pages * PAGE
        assert view.read(0, view.size) == image.bytes()
        assert [(s, s + n) for s, n in view.extents()] == runs(set(image.data))
        allocated = len({p // 128 for p in image.data})
        assert allocated * 65536 >= sum(n for _, n in view.extents())


PageBlobs.TestCase.settings = settings(
    max_examples=40, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestPageBlobs = PageBlobs.TestCase


class ManyPageBlobs(PageBlobs):
    """The same, longer."""


ManyPageBlobs.TestCase.settings = settings(
    max_examples=150, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
TestManyPageBlobs = pytest.mark.timeout(900)(pytest.mark.slow(ManyPageBlobs.TestCase))


@pytest.mark.slow  # 10 to 30 s: each break must be met by chance
@pytest.mark.parametrize(
    ("method", "sound", "broken"),
    [
        ("apply", "loose.difference_update(v.slot for v in versions)", "pass"),
        ("plan_drop", "if gen < v.gen <= heir", "if v.gen == heir"),
        ("plan_drop", "written=theirs.written | mine.written", "written=theirs.written"),
        ("plan_clear", "if not valid and alone:", "if not valid and old.gen == gen:"),
        ("plan_write", "(old.valid & ~mask) if old else 0", "0"),
        ("_visible", "if version.gen <= gen:", "if version.gen <= gen + 1:"),
        ("_diff", "after & written", "after"),
        ("_diff", "before & ~after", "before & ~after & written"),
        ("_take", "self._end += 1", "self._end += not change.taken"),
    ],
)
def test_the_model_notices_a_broken_page_store(monkeypatch, method, sound, broken):
    source = textwrap.dedent(inspect.getsource(getattr(pages.PageStore, method)))
    assert sound in source
    scope: dict[str, object] = {}
    exec(source.replace(sound, broken), vars(pages), scope)
    monkeypatch.setattr(pages.PageStore, method, scope[method])
    with pytest.raises(Exception, match=r"(?s).*"):
        run_state_machine_as_test(
            PageBlobs,
            settings=settings(
                max_examples=200,
                stateful_step_count=25,
                deadline=None,
                database=None,
                derandomize=True,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
                print_blob=False,
            ),
        )
