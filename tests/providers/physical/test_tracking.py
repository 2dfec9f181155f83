"""What the trace tracker says after everything that may happen to it: never less than the truth, else a reason."""

from __future__ import annotations

import errno
import os
import subprocess
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farshore.providers.physical.agent import disks, tracing
from farshore.providers.physical.agent.blocks import BLOCK, Blocks
from farshore.providers.physical.agent.disks import Device
from farshore.providers.physical.agent.tracing import TraceTracker
from farshore.providers.physical.agent.tracking import KEPT, Book, NotKnown

MIB = 1 << 20


@pytest.fixture
def track(tmp_path, tracefs):
    """`track()` makes a tracker of the same name and state each time, as restarts of one agent do."""
    made: list[TraceTracker] = []

    def begin(**more) -> TraceTracker:
        made.append(TraceTracker(tracefs, f"tt{os.getpid()}", tmp_path / "trace.json", **more))
        return made[-1]

    yield begin
    for one in made:
        if not one._ending:
            one.stop(clean=False)
    folder = tracefs / f"instances/tt{os.getpid()}"
    if folder.exists():
        folder.rmdir()


def poke(path: str, offset: int, length: int = 4096) -> None:
    """Write to a device past the cache."""
    import mmap

    file = os.open(path, os.O_RDWR | os.O_DIRECT)
    try:
        buffer = mmap.mmap(-1, length)
        buffer.write(os.urandom(length))
        os.pwrite(file, buffer, offset)
    finally:
        os.close(file)


def runs(blocks: Blocks) -> list[tuple[int, int]]:
    return list(blocks.runs())


def test_writes_are_told_between_marks(machine, track):
    path = machine.add("d", 16)
    tracker = track()
    tracker.watch({"d": disks.device(path)})
    first = tracker.mark()["d"]
    poke(path, 3 * BLOCK + 4096)
    second = tracker.mark()["d"]
    poke(path, 5 * BLOCK - 4096, 8192)
    assert runs(tracker.changed("d", first, second)) == [(3 * BLOCK, BLOCK)]
    assert runs(tracker.changed("d", second)) == [(4 * BLOCK, 2 * BLOCK)]
    assert runs(tracker.changed("d", first)) == [(3 * BLOCK, 3 * BLOCK)]


def test_discards_and_zeroed_ranges_count(machine, track):
    path = machine.add("d", 16)
    tracker = track()
    tracker.watch({"d": disks.device(path)})
    mark = tracker.mark()["d"]
    subprocess.run(["blkdiscard", "-o", str(MIB), "-l", str(MIB), path], check=True)
    subprocess.run(["blkdiscard", "-z", "-o", str(4 * MIB), "-l", str(MIB), path], check=True)
    assert runs(tracker.changed("d", mark)) == [(MIB, MIB), (4 * MIB, MIB)]


def test_writes_to_a_partition_count_for_the_whole_disk(machine, track):
    path = machine.add("d", 16)
    table = bytearray(512)  # an MBR with one Linux partition from 4 MiB on
    table[446:462] = (
        bytes([0, 0, 0, 0, 0x83, 0, 0, 0]) + (8192).to_bytes(4, "little") + (8192).to_bytes(4, "little")
    )
    table[510:512] = b"\x55\xaa"
    with open(path, "r+b") as file:
        file.write(table)
        file.flush()
        os.fsync(file.fileno())
    subprocess.run(["partx", "-u", path], check=False, capture_output=True)
    subprocess.run(["partx", "-a", path], check=False, capture_output=True)
    part = f"{path}p1"
    if not os.path.exists(part):
        pytest.skip("the kernel shows no partitions of loop devices")
    try:
        assert disks.device(path).number in disks.below(disks.device(part).number)
        tracker = track()
        tracker.watch({"d": disks.device(path)})
        mark = tracker.mark()["d"]
        poke(part, 0)
        assert runs(tracker.changed("d", mark)) == [(4 * MIB, BLOCK)]
    finally:
        subprocess.run(["partx", "-d", path], check=False, capture_output=True)


def test_several_disks_are_told_apart(machine, track):
    paths = {key: machine.add(key, 8) for key in ("a", "b", "c")}
    tracker = track()
    tracker.watch({key: disks.device(path) for key, path in paths.items() if key != "c"})
    marks = tracker.mark()
    poke(paths["b"], 2 * BLOCK)
    poke(paths["c"], 0)
    assert runs(tracker.changed("a", marks["a"])) == []
    assert runs(tracker.changed("b", marks["b"])) == [(2 * BLOCK, BLOCK)]


def test_a_ring_that_is_too_small_is_noticed(machine, track, monkeypatch):
    path = machine.add("d", 64)
    tracker = track(buffer_kib=4)
    tracker.watch({"d": disks.device(path)})
    mark = tracker.mark()["d"]
    with tracker._lock:  # the reader is held up, as on a machine without time
        for number in range(3000):
            poke(path, number % 1000 * BLOCK)
    with pytest.raises(NotKnown, match="trace events were lost"):
        tracker.changed("d", mark)
    fresh = tracker.mark()["d"]
    assert fresh.split(":")[1] != mark.split(":")[1]
    poke(path, BLOCK)
    assert runs(tracker.changed("d", fresh)) == [(BLOCK, BLOCK)]  # it goes on by itself
    with pytest.raises(NotKnown, match="trace events were lost"):
        tracker.changed("d", mark)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("tracing_on", "0", "cannot be written to|did not answer|switched the trace off"),
        ("events/block/block_bio_queue/enable", "0", "switched the trace off"),
        ("events/block/block_bio_queue/filter", "dev == 1", "switched the trace off or changed its filter"),
        ("trace", "", "emptied or read|did not answer"),
    ],
)
def test_hands_in_the_trace_are_noticed(machine, track, monkeypatch, name, value, reason):
    monkeypatch.setattr(tracing, "_PATIENCE", 1.0)
    path = machine.add("d", 8)
    tracker = track()
    tracker.watch({"d": disks.device(path)})
    mark = tracker.mark()["d"]
    (tracker._folder / name).write_text(value)
    with pytest.raises(NotKnown, match=reason):
        tracker.changed("d", mark)


def test_a_reader_beside_us_is_refused_or_noticed(machine, track):
    path = machine.add("d", 8)
    tracker = track()
    tracker.watch({"d": disks.device(path)})
    mark = tracker.mark()["d"]
    with tracker._lock:  # our own reader stands still meanwhile
        poke(path, 0)
        try:
            pipe = os.open(tracker._folder / "trace_pipe", os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            return  # newer kernels let one reader in
        stolen = os.read(pipe, 65536)
        os.close(pipe)
    assert b"block_bio_queue" in stolen
    with pytest.raises(NotKnown, match="somebody else emptied or read"):
        tracker.changed("d", mark)


def test_after_a_clean_restart_tracking_goes_on(machine, track):
    path = machine.add("d", 16)
    tracker = track()
    tracker.watch({"d": disks.device(path)})
    mark = tracker.mark()["d"]
    poke(path, BLOCK)
    tracker.stop(clean=True)
    poke(path, 7 * BLOCK)  # while no agent runs
    again = track()
    again.watch({"d": disks.device(path)})
    poke(path, 9 * BLOCK)
    assert runs(again.changed("d", mark)) == [(BLOCK, BLOCK), (7 * BLOCK, BLOCK), (9 * BLOCK, BLOCK)]


def test_events_that_did_not_fit_while_no_agent_ran_are_noticed(machine, track):
    path = machine.add("d", 64)
    tracker = track(buffer_kib=4)
    tracker.watch({"d": disks.device(path)})
    mark = tracker.mark()["d"]
    tracker.stop(clean=True)
    for number in range(3000):
        poke(path, number % 1000 * BLOCK)
    again = track(buffer_kib=4)
    again.watch({"d": disks.device(path)})
    with pytest.raises(NotKnown, match="trace events were lost"):
        again.changed("d", mark)


def test_after_an_unclean_stop_nothing_is_known(machine, track):
    path = machine.add("d", 16)
    tracker = track()
    tracker.watch({"d": disks.device(path)})
    mark = tracker.mark()["d"]
    # What a SIGKILL leaves: the instance, and a state that says "running".
    tracker._ending = True
    tracker._thread.join()
    os.close(tracker._pipe)
    os.close(tracker._marks)
    again = track()
    again.watch({"d": disks.device(path)})
    with pytest.raises(NotKnown, match="stopped or the machine was started anew"):
        again.changed("d", mark)


def test_after_a_reboot_nothing_is_known(machine, track, monkeypatch):
    path = machine.add("d", 16)
    tracker = track()
    tracker.watch({"d": disks.device(path)})
    mark = tracker.mark()["d"]
    tracker.stop(clean=True)
    monkeypatch.setattr(disks, "boot_id", lambda: "another")
    again = track()
    again.watch({"d": disks.device(path)})
    with pytest.raises(NotKnown, match="started anew"):
        again.changed("d", mark)


def test_a_resized_or_replaced_disk_begins_anew_and_its_neighbour_does_not(machine, track):
    a, b = machine.add("a", 16), machine.add("b", 16)
    tracker = track()
    tracker.watch({"a": disks.device(a), "b": disks.device(b)})
    marks = tracker.mark()
    with machine.images["a"].open("r+b") as file:
        file.truncate(24 * MIB)
    subprocess.run(["losetup", "-c", a], check=True)
    tracker.watch({"a": disks.device(a), "b": disks.device(b)})
    poke(b, BLOCK)
    with pytest.raises(NotKnown, match="resized from"):
        tracker.changed("a", marks["a"])
    assert runs(tracker.changed("b", marks["b"])) == [(BLOCK, BLOCK)]
    later = tracker.mark()
    # The same number, name and size, other media: only the kernel's sequence tells.
    subprocess.run(["losetup", "-d", a], check=True)
    subprocess.run(["losetup", a, str(machine.images["a"])], check=True)
    if not disks.device(a).sequence:
        pytest.skip("this kernel has no diskseq")
    tracker.watch({"a": disks.device(a), "b": disks.device(b)})
    with pytest.raises(NotKnown, match="another device"):
        tracker.changed("a", later["a"])


def test_the_true_device_is_not_confused_by_a_kept_state_of_another(machine, track):
    path = machine.add("d", 16)
    tracker = track()
    one = disks.device(path)
    tracker.watch({"d": one})
    mark = tracker.mark()["d"]
    tracker.stop(clean=True)
    again = track()
    again.watch({"d": replace(one, sequence="other")})
    with pytest.raises(NotKnown, match="another one"):
        again.changed("d", mark)


# -- without a kernel --------------------------------------------------------------------------------------------

DEVICE = Device("/dev/none", 7, 0, 40 * BLOCK + 512, "x", "1")


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.integers(0, DEVICE.size), st.integers(0, 5 * BLOCK)),
            st.sampled_from(["mark", "tidy", "restart"]),
        ),
        max_size=60,
    )
)
def test_a_book_tells_a_superset_between_any_two_marks(story):
    book, written, marks = Book("trace", DEVICE), Blocks(DEVICE.size), [("trace", 0)]
    per_mark: list[set[int]] = [set()]
    for step in story:
        if step == "mark":
            book.mark()
            per_mark.append(set())
        elif step == "tidy":
            book.tidy()
        elif step == "restart":
            book = Book.load("trace", DEVICE, book.dump())
        else:
            offset, length = step
            book.current.add(offset, length)
            probe = Blocks(DEVICE.size)
            probe.add(offset, length)
            per_mark[-1] |= {block for block in range(len(probe.bits)) if block in probe}
    for since in range(len(per_mark)):
        for until in [*range(since, len(per_mark)), None]:
            truth = set().union(*per_mark[since:until])
            told = book.changed(since, until)
            assert {block for block in range(len(told.bits)) if block in told} == truth
    del written, marks


def test_old_generations_are_joined_and_never_forgotten():
    book = Book("trace", DEVICE)
    for number in range(3 * KEPT):
        book.current.add(number % 40 * BLOCK, 1)
        book.mark()
        book.tidy()
    assert len(book.generations) == KEPT
    assert len(book.changed(0, None)) == 40
    assert len(book.changed(3 * KEPT - 1, None)) == 1
    assert len(book.changed(KEPT, None)) == 40  # inside what was joined: more, never less


def test_a_mark_without_a_freeze_takes_along_what_may_be_under_way():
    book = Book("trace", DEVICE)
    book.current.add(0, 1)
    book.mark()
    book.generations[-1].ended -= 100
    book.current.add(BLOCK, 1)
    book.mark()
    book.current.add(2 * BLOCK, 1)
    assert runs(book.changed(2, None)) == [(2 * BLOCK, BLOCK)]
    assert runs(book.changed(2, None, 60.0)) == [(BLOCK, 2 * BLOCK)]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, DEVICE.size + BLOCK), st.integers(0, 3 * BLOCK)), max_size=20),
    st.integers(0, 4),
)
def test_runs_of_blocks_cover_what_was_added_and_stay_on_the_disk(ranges, longest):
    blocks = Blocks(DEVICE.size)
    for offset, length in ranges:
        blocks.add(offset, length)
    pieces = list(blocks.runs(longest * BLOCK))
    assert sum(length for _, length in pieces) == blocks.bytes()
    assert all(
        offset % BLOCK == 0 and length > 0 and offset + length <= DEVICE.size for offset, length in pieces
    )
    assert pieces == sorted(pieces)
    for offset, length in ranges:
        if length and offset < DEVICE.size:
            assert blocks.any(offset, min(length, DEVICE.size - offset))
    assert Blocks.unpack(DEVICE.size, blocks.pack()).bits == blocks.bits
