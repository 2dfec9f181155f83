"""`python -m farshore.lab.blob --root DIR [--port N]`: one storage account, stand-alone.

Prints one JSON line when it is ready: {"url", "account", "account_url", "key", "ca_file", "pid"}. SIGTERM or Ctrl-C
stops it. `--https` makes certificates under ROOT/tls.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import secrets
import signal
from pathlib import Path

from farshore.lab import tls

from .server import BlobServer
from .store import BlobStore


def account_key(root: Path) -> str:
    """The account's key of an earlier start, or a new one."""
    file = root / "account-key"
    if not file.exists():
        root.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        file.write_text(base64.b64encode(secrets.token_bytes(64)).decode())
    return file.read_text().strip()


async def serve(args: argparse.Namespace) -> None:
    """Run until a signal asks to stop."""
    root = Path(args.root)
    key = args.key or account_key(root)
    store = BlobStore(root, args.account, key, durable=args.durable)
    server = BlobServer(store)
    context = tls.server_context(root / "tls") if args.https else None
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await server.start("127.0.0.1", args.port, context)
    try:
        ready = {
            "url": server.url,
            "account": args.account,
            "account_url": server.account_url(args.account),
            "key": key,
            "ca_file": str(root / "tls" / "ca.pem") if args.https else None,
            "pid": os.getpid(),
        }
        print(json.dumps(ready), flush=True)
        await stop.wait()
    finally:
        await server.stop()
        store.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m farshore.lab.blob", description="Laboratory Azure blob service"
    )
    parser.add_argument("--root", required=True, help="directory that keeps the account")
    parser.add_argument("--port", type=int, default=0, help="0: the system chooses")
    parser.add_argument("--account", default="farshorelab")
    parser.add_argument("--key", default="", help="Base64; default: made once and kept in ROOT/account-key")
    parser.add_argument("--https", action="store_true")
    parser.add_argument("--durable", action="store_true", help="wait for the disk on every write")
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
