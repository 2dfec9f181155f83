"""Trackers: whatever is joined, dropped or lost, the chosen bitmaps cover every write since the point, or none are chosen."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farshore.providers.nbd import bitmaps
from farshore.providers.nbd.disks import CutName, item, owner_of


@dataclass
class Model:
    """A disk whose writes are numbered by the interval between two cuts in which they happen."""

    described: list[dict] = field(default_factory=list)
    covers: dict[str, set[int]] = field(default_factory=dict)  # intervals that a bitmap has recorded
    interval: int = 0
    run: str = "0"  # of the process of QEMU
    copy: tuple[list[dict], dict[str, set[int]]] | None = None

    def write(self) -> None:
        for entry in self.described:
            if entry["recording"]:
                self.covers[entry["name"]].add(self.interval)

    def add(self, name: str, *, recording: bool = True, covers: set[int] | None = None) -> None:
        assert all(entry["name"] != name for entry in self.described)
        self.described.append({"name": name, "recording": recording, "granularity": 65536})
        self.covers[name] = covers or set()

    def remove(self, name: str) -> None:
        self.described = [entry for entry in self.described if entry["name"] != name]

    def line(self) -> bitmaps.Line | None:
        return bitmaps.line_of(bitmaps.read(self.described, "vm"))[0]

    def cut(self, word: str) -> str:
        """As the source does it; returns the tracker."""
        line = self.line()
        word, number = (line.word, line.next) if line else (word, 1)
        for entry in self.described:
            if line and entry["name"] == line.bitmaps[-1].name:
                entry["recording"] = False
        self.interval += 1
        mark = bitmaps.marked(word, number, self.run)
        self.add(bitmaps.name("vm", word, number, number, mark))
        if line is None:
            for bitmap in bitmaps.read(self.described, "vm"):
                if bitmap.line != word:
                    self.remove(bitmap.name)
        return bitmaps.tracker(word, number, mark)

    def save(self) -> None:
        """Copy the image with its trackers."""
        self.copy = copy.deepcopy((self.described, self.covers))

    def restore(self) -> None:
        """Bring the copy back: everything may be different now, and no tracker noted it."""
        if self.copy is not None:
            self.described, self.covers = copy.deepcopy(self.copy)
            self.run = str(int(self.run) + 1)
            self.interval += 1  # the change by the restoring itself, which nothing records

    def join(self) -> None:
        line = self.line()
        pair = bitmaps.join_plan(line, 3) if line else None
        if line is None or pair is None:
            return
        name = bitmaps.name("vm", line.word, pair[0].first, pair[1].last, pair[0].mark)
        self.add(name, recording=False, covers=self.covers[pair[0].name] | self.covers[pair[1].name])
        for bitmap in pair:
            self.remove(bitmap.name)


STEPS = st.lists(
    st.sampled_from(
        [
            "write",
            "cut",
            "cut",
            "cut",
            "commit",
            "join",
            "drop",
            "lose",
            "off",
            "on",
            "spoil",
            "save",
            "restore",
        ]
    ),
    max_size=40,
)


def story(steps: list[str]) -> None:
    model = Model()
    base: tuple[str, int] | None = None  # tracker of the committed state, and the interval that begins there
    newest: tuple[str, int] | None = None
    for number, step in enumerate(steps):
        line = model.line()
        if step == "write":
            model.write()
        elif step == "cut":
            before = line
            model.write()
            tracker = model.cut(f"{number:08x}")
            newest = (tracker, model.interval)
            parsed = bitmaps.parse_tracker(base[0]) if base else None
            if base and parsed and before and before.word == parsed[0]:
                chosen = before.since(parsed[1], parsed[2])
                found = set().union(*(model.covers[bitmap.name] for bitmap in chosen))
                missed = set(range(base[1], model.interval)) - found
                assert not chosen or not missed, (step, number, missed)
        elif step == "commit":
            base = newest or base
        elif step == "join":
            model.join()
        elif step == "save":
            model.save()
        elif step == "restore":
            model.restore()
        elif step == "drop" and base and line:
            parsed = bitmaps.parse_tracker(base[0])
            for bitmap in line.bitmaps:
                if parsed and line.word == parsed[0] and bitmap.last < parsed[1]:
                    model.remove(bitmap.name)
        elif step == "lose" and model.described:  # a foreign hand
            model.remove(model.described[number % len(model.described)]["name"])
        elif step in {"off", "on"} and model.described:
            model.described[number % len(model.described)]["recording"] = step == "on"
        elif step == "spoil" and model.described:
            model.described[number % len(model.described)]["inconsistent"] = True


@given(STEPS)
@settings(max_examples=300, deadline=None, derandomize=True)
def test_every_interval_since_the_point_is_covered_or_a_comparison_is_asked_for(steps):
    story(steps)


CARELESS = {
    "a line that was switched off is believed": (
        (bitmaps, "_broken", lambda members: ""),
        ["cut", "commit", "off", "cut"],
    ),
    "a joined bitmap is overlooked": (
        (bitmaps.Line, "since", lambda self, cut, mark: tuple(b for b in self.bitmaps if b.first >= cut)),
        ["cut", "cut", "commit", "cut", "cut", "cut", "join", "cut"],
    ),
    "numbers are believed without their marks": (
        (bitmaps, "marked", lambda line, cut, run: "00000000"),
        ["cut", "save", "cut", "commit", "restore", "cut", "cut"],
    ),
    "a line that does not reach back is believed": (
        (bitmaps.Line, "since", lambda self, cut, mark: tuple(b for b in self.bitmaps if b.last >= cut)),
        ["cut", "commit", "write", "cut", "lose", "cut"],
    ),
}


@pytest.mark.parametrize("what", CARELESS)
def test_careless_rules_are_caught_by_kept_stories(monkeypatch, what):
    (where, rule, instead), steps = CARELESS[what]
    story(steps)
    monkeypatch.setattr(where, rule, instead)
    with pytest.raises(AssertionError):
        story(steps)


def test_names_are_read_back_and_fit_qemus_limits():
    for machine in ("vm", "a-b-1-2", "x" * 60, "web.01"):
        cut = CutName.parse(f"farshore-{machine}-12-34567")
        assert (cut.machine, cut.epoch, cut.cycle) == (machine, 12, 34567)
        name = item(CutName(machine, 0xFFFF, 0xFFFFFF).stem("beef"), 30, "f")
        assert len(name) <= 31
        found = owner_of(name, machine)
        assert found is not None and found[1] == CutName(machine, 0xFFFF, 0xFFFFFF)
        assert name.startswith(found[0] + ".")
        assert owner_of(name, machine + "x") is None
    for name in ("farshore-vm-1", "backup-vm-1-2", "farshore-vm-a-2"):
        with pytest.raises(ValueError, match="is not farshore-"):
            CutName.parse(name)
    assert owner_of("drive0", "vm") is None
