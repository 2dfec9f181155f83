"""Our NBD client agrees with servers and clients that we did not write: qemu-nbd, nbdkit, nbdinfo, qemu-img."""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import json
import random
import shutil
import socket
import subprocess
import time
from contextlib import contextmanager

import pytest

from farshore.domain.errors import Code, FarshoreError
from farshore.providers.nbd import ClientTls, NbdClient
from farshore.providers.nbd import protocol as nbd

pytestmark = pytest.mark.foreign
MIB = 1 << 20


def need(*tools: str) -> None:
    packages = {
        "qemu-nbd": "qemu-utils",
        "qemu-img": "qemu-utils",
        "qemu-io": "qemu-utils",
        "nbdinfo": "libnbd-bin",
        "nbdkit": "nbdkit",
    }
    absent = sorted({packages[tool] for tool in tools if shutil.which(tool) is None})
    if absent:
        pytest.skip(f"not installed: {', '.join(absent)}")


@contextmanager
def running(*command: str, ready):
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 30
        while not ready():
            assert process.poll() is None, f"{command[0]} ended with {process.returncode}"
            assert time.monotonic() < until, f"{command[0]} is not ready"
            time.sleep(0.02)
        yield process
    finally:
        process.terminate()
        process.wait(30)


def listening(path: str):
    def ready() -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(path) == 0

    return ready


def image(path, size: int, writes: list[tuple[int, int, int]]) -> str:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), str(size)], check=True)
    write(path, writes)
    return str(path)


def write(path, writes: list[tuple[int, int, int]]) -> None:
    commands = [
        part for offset, length, value in writes for part in ("-c", f"write -P {value} {offset} {length}")
    ]
    subprocess.run(["qemu-io", *commands, str(path)], check=True, stdout=subprocess.DEVNULL)


def runs(client: NbdClient, context: str, **options) -> list[tuple[int, int, int]]:
    """Neighbouring runs of equal flags joined, as nbdinfo shows them."""
    joined: list[tuple[int, int, int]] = []
    for offset, length, flags in client.status(context, **options):
        if joined and joined[-1][2] == flags:
            joined[-1] = (joined[-1][0], joined[-1][1] + length, flags)
        else:
            joined.append((offset, length, flags))
    return joined


def foreign_map(uri: str, context: str) -> list[tuple[int, int, int]]:
    done = subprocess.run(["nbdinfo", f"--map={context}", "--json", uri], capture_output=True, check=True)
    found: list[tuple[int, int, int]] = []
    for row in json.loads(done.stdout):
        if found and found[-1][2] == row["type"]:
            found[-1] = (found[-1][0], found[-1][1] + row["length"], row["type"])
        else:
            found.append((row["offset"], row["length"], row["type"]))
    return found


def test_bytes_allocation_and_dirty_bitmaps_are_those_that_qemu_tells(tmp_path):
    """A disk beyond 4 GiB, so that lengths of 32 bits do not reach."""
    need("qemu-nbd", "qemu-img", "qemu-io", "nbdinfo")
    size = 9 << 30
    disk = image(tmp_path / "d.qcow2", size, [(0, MIB, 1), (5 << 30, 3 * MIB, 2), (size - MIB, MIB, 3)])
    subprocess.run(["qemu-img", "bitmap", "--add", "-g", "65536", disk, "x"], check=True)
    write(disk, [(70_000 // 512 * 512, 512, 4), ((4 << 30) - 512, 1024, 5), (size - 512, 512, 6)])
    path = str(tmp_path / "nbd")
    dirty = "qemu:dirty-bitmap:x"
    with (
        running(
            *("qemu-nbd", "-r", "-t", "-e", "8", "-k", path, "-f", "qcow2", "-B", "x", disk),
            ready=listening(path),
        ),
        NbdClient(path, "", contexts=(nbd.ALLOCATION, dirty)) as client,
    ):
        uri = f"nbd+unix:///?socket={path}"
        assert client.size == size and client.has(dirty) and client.has(nbd.ALLOCATION)
        for context in (nbd.ALLOCATION, dirty):
            wanted = foreign_map(uri, context)
            assert runs(client, context) == wanted and len(wanted) >= 5
            assert runs(client, context, step=100_000_000) == wanted
        assert client.read((5 << 30) - 512, 2 * MIB) == bytes(512) + b"\2" * (2 * MIB - 512)
        assert client.read(size - 1024, 1024) == b"\3" * 512 + b"\6" * 512
        with pytest.raises(FarshoreError) as failed:
            list(client.status("qemu:dirty-bitmap:y"))
        assert failed.value.info.details == {"reason": "no-context"}
    with running(*("qemu-nbd", "-r", "-t", "-k", path, "-f", "qcow2", disk), ready=listening(path)):
        with NbdClient(path, "", contexts=(dirty,)) as client:
            assert not client.has(dirty)
        with pytest.raises(FarshoreError) as failed:
            NbdClient(path, "another")
        assert failed.value.code is Code.SOURCE_NOT_ELIGIBLE


def test_a_whole_image_is_copied_as_qemu_img_does(tmp_path):
    need("qemu-nbd", "qemu-img", "qemu-io")
    choose = random.Random(9)
    size = 24 * MIB + 512
    writes = [
        (choose.randrange(0, size - MIB) // 512 * 512, choose.randint(1, 1000) * 512, choose.randrange(256))
        for _ in range(40)
    ]
    disk = image(tmp_path / "d.qcow2", size, writes)
    subprocess.run(["qemu-img", "convert", "-O", "raw", disk, str(tmp_path / "d.raw")], check=True)
    path = str(tmp_path / "nbd")
    copy = bytearray(size)
    with (
        running(*("qemu-nbd", "-r", "-t", "-k", path, "-f", "qcow2", disk), ready=listening(path)),
        NbdClient(path, "", contexts=(nbd.ALLOCATION,)) as client,
    ):
        wanted = [
            (offset, memoryview(copy)[offset : offset + length])
            for offset, length, flags in client.status(nbd.ALLOCATION)
            if not flags & nbd.STATE_ZERO
        ]
        assert [offset for offset, _ in client.read_many(wanted)] == [offset for offset, _ in wanted]
    assert hashlib.sha256(copy).digest() == hashlib.sha256((tmp_path / "d.raw").read_bytes()).digest()


def test_a_server_without_structured_replies_and_one_with_large_blocks(tmp_path):
    need("nbdkit")
    path = str(tmp_path / "nbd")
    pattern = b"".join(number.to_bytes(8, "big") for number in range(0, 1 << 16, 8))
    with (
        running(*("nbdkit", "-f", "-r", "--no-sr", "-U", path, "pattern", "1M"), ready=listening(path)),
        NbdClient(path, "", contexts=(nbd.ALLOCATION,)) as client,
    ):
        assert not client.terms.structured and not client.has(nbd.ALLOCATION)
        assert client.read(0, 1 << 16) == pattern
    path = str(tmp_path / "large")
    blocks = ["blocksize-minimum=4096", "blocksize-preferred=65536", "blocksize-maximum=128K"]
    with (
        running(
            *("nbdkit", "-f", "-r", "-U", path, "--filter=blocksize-policy", "pattern", "1M"),
            *(*blocks, "blocksize-error-policy=error"),
            ready=listening(path),
        ),
        NbdClient(path, "") as client,
    ):
        assert (client.terms.min_block, client.terms.max_block) == (4096, 131072)
        assert client.read(512, 5000) == pattern[512:5512]
        assert len(client.read(0, MIB)) == MIB


def test_errors_of_a_server_concern_one_request(tmp_path):
    need("nbdkit")
    path, trigger = str(tmp_path / "nbd"), tmp_path / "trigger"
    with (
        running(
            *("nbdkit", "-f", "-r", "-U", path, "--filter=error", "pattern", "1M"),
            *("error=ENOMEM", "error-pread-rate=100%", f"error-file={trigger}"),
            ready=listening(path),
        ),
        NbdClient(path, "") as client,
    ):
        assert client.read(8, 8) == (8).to_bytes(8, "big")
        trigger.touch()
        with pytest.raises(FarshoreError, match="ENOMEM") as failed:
            client.read(8, 8)
        assert failed.value.info.details == {"reason": "refused"} and not client.broken
        trigger.unlink()
        assert client.read(8, 8) == (8).to_bytes(8, "big")


def test_a_server_that_dies_is_an_error(tmp_path):
    need("nbdkit")
    path = str(tmp_path / "nbd")
    with running(*("nbdkit", "-f", "-r", "-U", path, "pattern", "64M"), ready=listening(path)) as process:
        client = NbdClient(path, "")
        client.read(0, 512)
        process.kill()
        process.wait(30)
        with pytest.raises(FarshoreError) as failed:
            client.read(0, 64 * MIB)
        assert failed.value.code is Code.SOURCE_READ_FAILED and client.broken
        client.close()


# -- TLS -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pki(tmp_path_factory):
    """An authority, a server for localhost, a client; and a client of another authority."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    folder = tmp_path_factory.mktemp("pki")
    now = datetime.datetime.now(datetime.UTC)

    def make(name: str, signer=None):
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        issuer, issuer_key = (signer[0].subject, signer[1]) if signer else (subject, key)
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        usage = x509.KeyUsage(True, False, False, False, False, signer is None, signer is None, False, False)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(signer is None, None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(usage, critical=True)
        )
        certificate = builder.sign(issuer_key, hashes.SHA256())
        (folder / f"{name}-cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        (folder / f"{name}-key.pem").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return certificate, key

    authority = make("ca")
    make("server", authority)
    make("client", authority)
    make("stranger", make("other"))
    return folder


def tls(pki, *, ca: str = "ca", client: str = "client", name: str | None = None) -> ClientTls:
    if not client:
        return ClientTls(pki / f"{ca}-cert.pem", name=name)
    return ClientTls(pki / f"{ca}-cert.pem", pki / f"{client}-cert.pem", pki / f"{client}-key.pem", name=name)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def on_port(port: int):
    def ready() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    return ready


@pytest.mark.parametrize("server", ["nbdkit", "qemu-nbd"])
def test_tls_with_certificates_of_both_sides(tmp_path, pki, server):
    need(server, "qemu-img", "qemu-io")
    port = free_port()
    if server == "nbdkit":
        said = subprocess.run(["nbdkit", "--dump-config"], capture_output=True, text=True, check=True).stdout
        if "tls=yes" not in said:
            pytest.skip("this nbdkit has no TLS")
        command = ["nbdkit", "-f", "-r", "-i", "127.0.0.1", "-p", str(port), "--tls=require"]
        command += [f"--tls-certificates={pki}", "--tls-verify-peer", "pattern", "16M"]
        wanted = b"".join(number.to_bytes(8, "big") for number in range(0, 8 * MIB, 8))
    else:
        disk = image(tmp_path / "d.qcow2", 16 * MIB, [(0, 8 * MIB, 7)])
        creds = tmp_path / "creds"
        creds.mkdir()
        for file in ("ca-cert.pem", "server-cert.pem", "server-key.pem"):
            shutil.copy(pki / file, creds / file)
        command = ["qemu-nbd", "-r", "-t", "-e", "8", "-b", "127.0.0.1", "-p", str(port), "-f", "qcow2"]
        command += ["--object", f"tls-creds-x509,id=t,endpoint=server,verify-peer=yes,dir={creds}"]
        command += ["--tls-creds", "t", disk]
        wanted = b"\7" * (8 * MIB)
    where = ("127.0.0.1", port)
    with running(*command, ready=on_port(port)):
        with NbdClient(where, "", contexts=(nbd.ALLOCATION,), tls=tls(pki)) as client:
            assert client.read(0, 8 * MIB) == wanted
            assert client.read(8 * MIB - 1000, 500) == wanted[-1000:-500]
            assert sum(length for _, length, _ in client.status(nbd.ALLOCATION)) == 16 * MIB
        refused = {
            "no TLS from us": None,
            "no certificate of ours": tls(pki, client=""),
            "a certificate of another authority": tls(pki, client="stranger"),
            "a server of another authority": tls(pki, ca="other"),
            "a server of another name": tls(pki, name="elsewhere.invalid"),
        }
        for what, files in refused.items():
            with (
                pytest.raises(FarshoreError) as failed,
                NbdClient(where, "", tls=files, timeout=10.0) as client,
            ):
                client.read(0, 512)
            assert failed.value.code is Code.CONFIGURATION_INVALID, (what, failed.value)


def test_tls_is_not_given_up_when_the_server_has_none(tmp_path, pki):
    need("nbdkit")
    path = str(tmp_path / "nbd")
    with running(*("nbdkit", "-f", "-r", "-U", path, "pattern", "1M"), ready=listening(path)):
        with pytest.raises(FarshoreError) as failed:
            NbdClient(path, "", tls=tls(pki))
        assert failed.value.code is Code.CONFIGURATION_INVALID
