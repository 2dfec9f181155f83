"""The NBD client gives exact bytes or a clear error, never anything else, and it never waits for ever."""

from __future__ import annotations

import itertools
import random
import struct
import threading
import time
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farshore.domain.errors import Code, FarshoreError
from farshore.providers.nbd import NbdClient
from farshore.providers.nbd import client as client_module
from farshore.providers.nbd import protocol as nbd

from . import rogue
from .rogue import Asked, Hang, HangUp, RogueServer, chunk, data, hole, option_reply, simple

BODY = random.Random(5).randbytes(1 << 18) + bytes(1 << 16) + random.Random(6).randbytes(1 << 17)
_numbers = itertools.count()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("nbd")


@contextmanager
def serving(folder, **options):
    server = RogueServer(str(folder / f"{next(_numbers)}"), options.pop("body", BODY), **options)
    try:
        yield server
    finally:
        server.close()


def opened(server, **options) -> NbdClient:
    return NbdClient(server.path, "e", **({"contexts": (nbd.ALLOCATION,)} | options))


def read_all(client: NbdClient, ranges, window: int = 8) -> list[bytes]:
    buffers = [(offset, memoryview(bytearray(length))) for offset, length in ranges]
    for _ in client.read_many(iter(buffers), window=window):
        pass
    return [bytes(view) for _, view in buffers]


# -- whatever a server may do ----------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 1 << 30),
    batch=st.integers(1, 5),
    structured=st.booleans(),
    ranges=st.lists(
        st.tuples(st.integers(0, len(BODY) - 1), st.integers(1, 70_000)).map(
            lambda pair: (pair[0], min(pair[1], len(BODY) - pair[0]))
        ),
        min_size=1,
        max_size=12,
    ),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_answers_in_any_order_and_in_any_pieces_are_put_together(folder, seed, batch, structured, ranges):
    """Replies overtake each other, chunks of different replies alternate, zeros come as holes."""
    choose = random.Random(seed)

    def answers(server, waiting):
        queues = [list(pieces(server, asked)) for asked in waiting]
        while queues:
            queue = choose.choice(queues) if server.structured else queues[-1]
            yield queue.pop(0)
            queues = [left for left in queues if left]

    def pieces(server, asked):
        body = server.body[asked.offset : asked.offset + asked.length]
        if not server.structured:
            yield simple(asked.cookie, body)
            return
        cuts = sorted(choose.sample(range(1, asked.length), min(choose.randint(0, 4), asked.length - 1)))
        spans = list(zip([0, *cuts], [*cuts, asked.length], strict=True))
        choose.shuffle(spans)
        last = choose.random() < 0.5
        for number, (begin, end) in enumerate(spans):
            done = last and number == len(spans) - 1
            part = body[begin:end]
            if not part.strip(b"\0") and choose.random() < 0.7:
                yield hole(asked.cookie, asked.offset + begin, end - begin, done=done)
            else:
                yield data(asked.cookie, asked.offset + begin, part, done=done)
        if not last:
            yield chunk(rogue.NONE, asked.cookie, done=True)

    ranges = ranges * batch  # whole batches, or the last one would wait for more
    with (
        serving(folder, answers=answers, batch=batch, structured=structured) as server,
        opened(server) as client,
    ):
        found = read_all(client, ranges, window=max(batch, 8) // batch * batch)
        assert found == [BODY[offset : offset + length] for offset, length in ranges]


def test_threads_share_a_connection_whose_replies_overtake_each_other(folder):
    def answers(server, waiting):
        return rogue.honest(server, list(reversed(waiting)))

    wrong: list[int] = []
    with serving(folder, answers=answers, batch=4) as server, opened(server) as client:
        turn = threading.Barrier(4)  # four at a time, as many as the server collects

        def reader(seed: int) -> None:
            choose = random.Random(seed)
            for _ in range(100):
                offset = choose.randrange(len(BODY) - 5000)
                turn.wait(60)
                if client.read(offset, 5000) != BODY[offset : offset + 5000]:
                    wrong.append(offset)

        threads = [threading.Thread(target=reader, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not wrong and not any(thread.is_alive() for thread in threads)


def test_an_error_of_one_request_leaves_the_others_and_the_connection_alone(folder):
    def answers(server, waiting):
        for asked in waiting:
            if asked.offset == 1000:
                yield data(asked.cookie, 1000, b"x" * 10)  # some bytes came before the error
                yield rogue.error(asked.cookie, 5, "the disk is ill")
            else:
                yield from rogue.honest(server, [asked])

    with serving(folder, answers=answers) as server, opened(server) as client:
        with pytest.raises(FarshoreError, match=r"EIO \(the disk is ill\)") as failed:
            read_all(client, [(0, 100), (1000, 100), (2000, 100)])
        assert failed.value.code is Code.SOURCE_READ_FAILED and failed.value.retryable
        assert failed.value.info.details == {"reason": "refused"}
        assert client.read(2000, 100) == BODY[2000:2100] and not client.broken


# -- what no server may do -------------------------------------------------------------------------------------------

A = Asked


def bytes_of(asked: Asked) -> bytes:
    return BODY[asked.offset : asked.offset + asked.length]


def two_parts(asked: Asked, end: int, begin: int) -> bytes:
    """The bytes up to `end`, then those from `begin` on."""
    body = bytes_of(asked)
    first = data(asked.cookie, asked.offset, body[:end])
    return first + data(asked.cookie, asked.offset + begin, body[begin:], done=True)


MALFORMED = {
    "a cookie that nobody sent": lambda a: data(a.cookie + 77, a.offset, bytes_of(a), done=True),
    "a wrong magic": lambda a: b"\x12\x34\x56\x78" + bytes(16),
    "a kind that does not exist": lambda a: chunk(77, a.cookie, bytes(8), done=True),
    "block status for a read": lambda a: chunk(5, a.cookie, struct.pack(">III", 1, 512, 0), done=True),
    "bytes behind the range": lambda a: data(a.cookie, a.offset + 1, bytes_of(a), done=True),
    "bytes before the range": lambda a: data(a.cookie, a.offset - 1, bytes_of(a), done=True),
    "bytes from far away": lambda a: data(a.cookie, 1 << 60, bytes_of(a), done=True),
    "more bytes than asked for": lambda a: data(a.cookie, a.offset, bytes_of(a) + b"x", done=True),
    "fewer bytes than asked for": lambda a: data(a.cookie, a.offset, bytes_of(a)[:-1], done=True),
    "no bytes at all": lambda a: chunk(0, a.cookie, done=True),
    "a gap in the middle": lambda a: two_parts(a, 500, 501),
    "halves that overlap": lambda a: two_parts(a, 501, 500),
    "halves that overlap and a gap": lambda a: (
        data(a.cookie, a.offset, bytes_of(a)[:500])
        + data(a.cookie, a.offset + 499, bytes_of(a)[499:-1], done=True)
    ),
    "the same bytes twice": lambda a: data(a.cookie, a.offset, bytes_of(a)) * 2,
    "an empty data chunk": lambda a: data(a.cookie, a.offset, b""),
    "a second reply": lambda a: data(a.cookie, a.offset, bytes_of(a), done=True) * 2,
    "an empty chunk with bytes": lambda a: chunk(0, a.cookie, b"x", done=True),
    "an empty chunk that is not the last": lambda a: chunk(0, a.cookie),
    "a hole that is too long": lambda a: hole(a.cookie, a.offset, a.length + 1, done=True),
    "a hole without length": lambda a: hole(a.cookie, a.offset, 0),
    "a hole of a wrong form": lambda a: chunk(2, a.cookie, bytes(11), done=True),
    "an error without a number": lambda a: chunk(rogue.ERROR, a.cookie, b"xy", done=True),
    "an error that is none": lambda a: rogue.error(a.cookie, 0),
    "an error with too long a text": lambda a: chunk(
        rogue.ERROR, a.cookie, struct.pack(">IH", 5, 999) + b"abc", done=True
    ),
    "a huge error": lambda a: chunk(rogue.ERROR, a.cookie, done=True, length=0xFFFFFFFF),
    "a huge data chunk": lambda a: chunk(1, a.cookie, struct.pack(">Q", a.offset), length=0xFFFFFFFF),
    "a simple reply where structured ones were agreed on": lambda a: simple(a.cookie, bytes_of(a)),
}
CLOSED = {
    "the end in the middle of a head": lambda a: data(a.cookie, a.offset, bytes_of(a), done=True)[:9],
    "the end in the middle of the bytes": lambda a: data(a.cookie, a.offset, bytes_of(a), done=True)[:500],
    "the end instead of a reply": lambda a: b"",
}


@pytest.mark.parametrize("what", [*MALFORMED, *CLOSED])
def test_a_reply_that_is_not_one_is_an_error_and_ends_the_connection(folder, what):
    reply = (MALFORMED | CLOSED)[what]

    def answers(server, waiting):
        for asked in waiting:
            if asked.offset != 4096:
                yield from rogue.honest(server, [asked])
                continue
            yield reply(asked)
            raise HangUp if what in CLOSED else Hang

    with serving(folder, answers=answers) as server, opened(server, silence=5.0) as client:
        assert client.read(0, 4096) == BODY[:4096]
        begun = time.monotonic()
        with pytest.raises(FarshoreError) as failed:
            # "a second reply" is only seen by whoever reads on
            read_all(client, [(4096, 1000), (8192, 1000)], window=1)
        assert failed.value.code is Code.SOURCE_READ_FAILED, what
        reason = "closed" if what in CLOSED else "malformed"
        assert failed.value.info.details["reason"] == reason, failed.value
        assert client.broken
        with pytest.raises(FarshoreError):
            client.read(0, 1)
        assert time.monotonic() - begun < 60


def test_a_structured_reply_that_was_not_agreed_on_is_an_error(folder):
    def answers(server, waiting):
        for asked in waiting:
            yield data(asked.cookie, asked.offset, bytes_of(asked), done=True)

    with (
        serving(folder, answers=answers, structured=False) as server,
        opened(server) as client,
        pytest.raises(FarshoreError, match="was not agreed on"),
    ):
        client.read(0, 10)


def drip(server, waiting):
    for asked in waiting:
        for byte in data(asked.cookie, asked.offset, bytes_of(asked), done=True):
            yield bytes([byte])
            time.sleep(0.05)  # the misbehaviour itself


def silence(server, waiting):
    raise Hang
    yield b""


@pytest.mark.parametrize("answers", [silence, drip])
def test_a_server_that_does_not_get_on_ends_in_a_time_out_for_every_thread(folder, answers):
    with serving(folder, answers=answers) as server, opened(server, silence=1.0, answer=1.5) as client:
        outcomes: list[str] = []

        def reader() -> None:
            try:
                client.read(0, 100_000)
                outcomes.append("bytes")
            except FarshoreError as failed:
                outcomes.append(failed.info.details["reason"])

        threads = [threading.Thread(target=reader) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert outcomes == ["timeout"] * 4


def test_close_wakes_the_threads_that_wait(folder):
    with serving(folder, answers=silence) as server:
        client = opened(server)
        reasons: list[str] = []

        def reader() -> None:
            try:
                client.read(0, 1000)
            except FarshoreError as failed:
                reasons.append(failed.info.details["reason"])

        threads = [threading.Thread(target=reader) for _ in range(3)]
        for thread in threads:
            thread.start()
        until = time.monotonic() + 30
        while len(client._pending) < 3:
            assert time.monotonic() < until
            time.sleep(0.01)
        client.close()
        for thread in threads:
            thread.join(60)
        assert reasons == ["closed"] * 3


STATUS = {
    "a context that was not agreed on": lambda a: chunk(
        5, a.cookie, struct.pack(">III", 9, 512, 0), done=True
    ),
    "a run without length": lambda a: chunk(5, a.cookie, struct.pack(">III", 1, 0, 0), done=True),
    "half a run": lambda a: chunk(5, a.cookie, struct.pack(">II", 1, 512), done=True),
    "no runs": lambda a: chunk(5, a.cookie, struct.pack(">I", 1), done=True),
    "nothing": lambda a: chunk(0, a.cookie, done=True),
    "runs behind the range": lambda a: chunk(
        5, a.cookie, struct.pack(">IIIII", 1, a.length, 0, 512, 0), done=True
    ),
    "the context twice": lambda a: chunk(5, a.cookie, struct.pack(">III", 1, 512, 0)) * 2,
    "a simple reply": lambda a: simple(a.cookie),
    "data": lambda a: data(a.cookie, a.offset, b"abc", done=True),
}


@pytest.mark.parametrize("what", STATUS)
def test_block_status_that_is_none_is_an_error(folder, what):
    def answers(server, waiting):
        for asked in waiting:
            yield STATUS[what](asked)
        raise Hang

    with serving(folder, answers=answers) as server, opened(server, silence=5.0) as client:
        with pytest.raises(FarshoreError) as failed:
            list(client.status(nbd.ALLOCATION))
        assert failed.value.info.details["reason"] == "malformed"


def test_block_status_is_asked_on_until_everything_is_covered(folder):
    """Servers may answer for less than was asked for, and for more in the last run."""
    choose = random.Random(1)

    def answers(server, waiting):
        for asked in waiting:
            first = choose.randint(1, asked.length)
            runs = [(first, 3)]
            if first < asked.length:
                runs.append((choose.randint(1, 1 << 31), 0))
            flat = [number for run in runs for number in run]
            yield chunk(5, asked.cookie, struct.pack(f">{1 + len(flat)}I", 1, *flat), done=True)

    with serving(folder, answers=answers) as server, opened(server) as client:
        at = 0
        for offset, length, _ in client.status(nbd.ALLOCATION, step=100_000):
            assert offset == at and length > 0
            at += length
        assert at == len(BODY)


GREETINGS = {
    "another protocol": {"greeting": b"SSH-2.0-OpenSSH_9.2\r\n" + bytes(20)},
    "the old style": {"greeting": b"NBDMAGIC" + struct.pack(">Q", 0x00420281861253) + bytes(200)},
    "a new style that is not fixed": {"greeting": b"NBDMAGICIHAVEOPT" + struct.pack(">H", 0)},
    "a reply with a wrong magic": {"option": lambda n, p: option_reply(n, 1, magic=1)},
    "a reply to another option": {"option": lambda n, p: option_reply(n + 1, 1)},
    "an acknowledgement with data": {"option": lambda n, p: option_reply(n, 1, b"x")},
    "no description of the export": {"option": lambda n, p: option_reply(n, 1) if n == 7 else None},
    "a description of a wrong length": {
        "option": lambda n, p: option_reply(n, 3, bytes(5)) if n == 7 else None
    },
    "an export without flags": {"flags": 0},
    "a context twice": {
        "option": lambda n, p: (
            option_reply(10, 4, struct.pack(">I", 1) + b"base:allocation") * 2 if n == 10 else None
        )
    },
    "a context that was not asked for": {
        "option": lambda n, p: option_reply(10, 4, struct.pack(">I", 1) + b"other:thing") if n == 10 else None
    },
    "impossible block sizes": {
        "option": lambda n, p: (
            option_reply(7, 3, struct.pack(">HIII", 3, 3, 4096, 1 << 20)) if n == 7 else None
        )
    },
    "a huge reply": {"option": lambda n, p: struct.pack(">QIII", rogue.OPTION_REPLY, n, 1, 1 << 31)},
}


@pytest.mark.parametrize("what", GREETINGS)
def test_a_negotiation_that_goes_wrong_is_an_error(folder, what):
    with serving(folder, **GREETINGS[what]) as server:
        with pytest.raises(FarshoreError) as failed:
            opened(server, timeout=10.0)
        assert failed.value.code is Code.SOURCE_READ_FAILED, failed.value
        assert failed.value.info.details == {"reason": "malformed"}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (0x80000006, Code.SOURCE_NOT_ELIGIBLE),
        (0x80000002, Code.ACCESS_DENIED),
        (0x80000005, Code.CONFIGURATION_INVALID),
        (0x80000007, Code.SOURCE_READ_FAILED),
    ],
)
def test_a_refused_export_is_named_with_the_servers_words(folder, error, code):
    def refuse(number, payload):
        return option_reply(number, error, b"go away") if number == 7 else None

    with serving(folder, option=refuse) as server:
        with pytest.raises(FarshoreError, match="go away") as failed:
            opened(server)
        assert failed.value.code is code


def test_a_server_that_hangs_in_the_negotiation_or_is_not_there_is_unreachable(folder):
    def hang(number, payload):
        raise Hang

    with serving(folder, option=hang) as server:
        with pytest.raises(FarshoreError) as failed:
            opened(server, timeout=0.5)
        assert failed.value.code is Code.SOURCE_UNREACHABLE
    with pytest.raises(FarshoreError) as failed:
        NbdClient(str(folder / "nobody"), "e")
    assert failed.value.code is Code.SOURCE_UNREACHABLE


def test_nothing_that_writes_can_be_sent(folder):
    """The commands that the client knows: read, disconnect, block status."""
    seen: set[int] = set()

    def answers(server, waiting):
        seen.update(asked.command for asked in waiting)
        return rogue.honest(server, waiting)

    with serving(folder, answers=answers) as server, opened(server) as client:
        client.read(0, 10)
        list(client.status(nbd.ALLOCATION))
    assert seen == {0, 7}
    assert {value for key, value in vars(nbd).items() if key.startswith("CMD_")} == {0, 2, 7}


def test_ranges_outside_the_export_never_reach_the_server(folder):
    with serving(folder) as server, opened(server) as client:
        for offset, length in ((-1, 10), (len(BODY), 1), (0, len(BODY) + 1)):
            with pytest.raises(ValueError, match="outside"):
                client.read(offset, length)
        assert client.read(len(BODY), 0) == b""


# -- tests of the tests ----------------------------------------------------------------------------------------------


def careless_complete(self, request):
    return None


def careless_place(self, request, offset, length):
    at = max(0, offset - request.offset)
    request.got += length
    request.spans.append((at, length))
    return request.view[at : at + length] if at + length <= request.length else memoryview(bytearray(length))


def careless_asked(self, cookie):
    return self._pending.get(cookie) or next(iter(self._pending.values()))


@pytest.mark.parametrize(
    ("step", "instead", "what"),
    [
        ("_complete", careless_complete, "fewer bytes than asked for"),
        ("_complete", careless_complete, "a gap in the middle"),
        ("_complete", careless_complete, "halves that overlap and a gap"),
        ("_place", careless_place, "bytes before the range"),
        ("_asked", careless_asked, "a cookie that nobody sent"),
    ],
)
def test_a_careless_client_is_caught(folder, monkeypatch, step, instead, what):
    monkeypatch.setattr(client_module.NbdClient, step, instead)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        test_a_reply_that_is_not_one_is_an_error_and_ends_the_connection(folder, what)
