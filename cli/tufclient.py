"""`loopback tuf-client`: the verifying client on its own, against any TUF repository, over HTTP or NATS.

It speaks the command-line protocol of the public TUF client conformance suite (theupdateframework/tuf-conformance,
CLIENT-CLI.md): `init ROOT`, `refresh`, `download`, options before or after them, exit code 0 or 1 and no other. What verifies
is `TrustedRepository`, as on hosts; only the sizes it follows are python-tuf's, since other repositories' files are larger.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import sys
import traceback
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar
from urllib import parse

import typer

from loopback.contracts import subjects
from loopback.contracts.codes import Code, Refused
from loopback.trust import blobs, http, tls
from loopback.trust.repository import Limits, TrustedRepository

if TYPE_CHECKING:
    from nats.aio.client import Client

_T = TypeVar("_T")

#: Bytes: what python-tuf's own client follows (tuf.ngclient.UpdaterConfig).
LIMITS: Final = Limits(root=512_000, timestamp=16_384, snapshot=2_000_000, targets=5_000_000)
FETCH_S: Final = 30.0  # one file over NATS
CONNECT_S: Final = 10.0
BUS: Final = ("nats", "tls")

Clock = Callable[[], datetime]

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(
    "tuf-client",
    add_help_option=False,  # its own help, with its own exit codes
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def tuf_client_command(ctx: typer.Context) -> None:
    """Follow any TUF repository with the client that hosts use: init, refresh, download."""
    raise typer.Exit(run(ctx.args))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(1, f"error: {message}\n  next: see 'loopback tuf-client --help'\n")


def run(arguments: list[str], now: Clock = lambda: datetime.now(UTC)) -> int:
    """One command; 0 where it was done, else 1, after saying on stderr why."""
    try:
        options = _parser().parse_intermixed_args(arguments)
        _complete(options)
        return _run(options, now)
    except SystemExit as end:  # argparse: help, or a mistake
        return 1 if end.code else 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 1
    except Exception as error:
        from loopback.cli.main import explain

        words = explain(error)
        if words is None:
            traceback.print_exc()
        else:
            print(words, file=sys.stderr)
        return 1


def _parser() -> _Parser:
    parser = _Parser(
        prog="loopback tuf-client",
        description="Follow a TUF repository with the client that hosts use. Exit code 0: done; 1: not done, "
        "and why on stderr.",
        epilog="A repository on the bus: --metadata-url nats://HOST:4222 --creds FILE; its content lies there too. "
        "Start with 'init ROOT', where ROOT is the repository's root.json, brought by somebody you trust.",
    )
    add = parser.add_argument
    add("command", choices=("init", "refresh", "download"), help="what to do")
    add("root", nargs="?", type=Path, help="init: the root to trust from now on")
    add(
        "--metadata-dir",
        type=Path,
        metavar="DIR",
        help="where what was verified is kept, a folder of its own",
    )
    add("--metadata-url", metavar="URL", help="where the metadata is: http(s)://… or nats://… (tls://…)")
    add("--target-name", metavar="PATH", help="download: the target's path in the repository")
    add("--target-base-url", metavar="URL", help="download: below which the content is, over HTTP")
    add("--target-dir", type=Path, metavar="DIR", help="download: where to put it")
    add("--creds", type=Path, metavar="FILE", help="over NATS: the credentials file")
    add("--ca", type=Path, metavar="FILE", help="over TLS: the certificates to trust instead of the system's")
    return parser


def _complete(options: argparse.Namespace) -> None:
    """Raises Refused where a command lacks what it needs."""
    needed = {
        "init": ("root",),
        "refresh": ("metadata_url",),
        "download": ("metadata_url", "target_name", "target_dir"),
    }
    names = ["metadata_dir", *needed[options.command]]
    on_bus = options.metadata_url is not None and parse.urlsplit(options.metadata_url).scheme in BUS
    if options.command == "download" and not on_bus:
        names.append("target_base_url")
    if on_bus:
        names.append("creds")
    missing = [
        "ROOT" if n == "root" else "--" + n.replace("_", "-") for n in names if getattr(options, n) is None
    ]
    if missing:
        raise Refused(
            Code.NAME_INVALID,
            f"{options.command} needs {', '.join(missing)}",
            "see 'loopback tuf-client --help'",
        )


def _run(options: argparse.Namespace, now: Clock) -> int:
    place: Path = options.metadata_dir
    if options.command == "init":
        TrustedRepository.pin(place, options.root.read_bytes())
        print(f"{place} trusts {options.root}", file=sys.stderr)
        return 0
    if parse.urlsplit(options.metadata_url).scheme in BUS:
        return asyncio.run(_on_bus(options, now))
    context = _tls(options.ca)
    fetch = http.fetcher(options.metadata_url, tls=context)
    repository = TrustedRepository(place, fetch, now=now, limits=LIMITS)
    if options.command == "refresh":
        return _refreshed(repository, place)
    content = http.fetcher(options.target_base_url, tls=context)
    return _said(options, repository.download(options.target_name, content, options.target_dir))


async def _on_bus(options: argparse.Namespace, now: Clock) -> int:
    """The same with metadata and content from the bus, read as a host reads them."""
    from loopback.host.link import direct_get

    loop = asyncio.get_running_loop()
    async with _connected(options) as nc:

        def wait(coroutine: Coroutine[Any, Any, _T]) -> _T:
            future = asyncio.run_coroutine_threadsafe(coroutine, loop)
            try:
                return future.result(FETCH_S)
            finally:
                future.cancel()

        def fetch(name: str) -> bytes | Iterable[bytes] | None:
            found = wait(direct_get(nc, subjects.STREAM_TUF, subjects.tuf(name)))
            return found[0] if found else None

        async def chunk(subject: str) -> tuple[bytes, dict[str, str]] | None:
            return await direct_get(nc, subjects.STREAM_BLOBS, subject)

        repository = TrustedRepository(options.metadata_dir, fetch, now=now, limits=LIMITS)
        if options.command == "refresh":
            return await asyncio.to_thread(_refreshed, repository, options.metadata_dir)
        found = await asyncio.to_thread(repository.find, options.target_name)
        if found is None:
            return _said(options, None)
        file, held = await asyncio.to_thread(_held, options, found.sha256)
        if not held:
            await blobs.download(chunk, found.sha256, max_size=LIMITS.content, size=found.length, into=file)
        return _said(options, file)


@asynccontextmanager
async def _connected(options: argparse.Namespace) -> AsyncIterator[Client]:
    from nats.aio.client import Client

    from loopback.services._runtime.settings import read_identity

    identity = read_identity(options.creds)
    nc = Client()
    try:
        async with asyncio.timeout(CONNECT_S):
            await nc.connect(
                options.metadata_url,
                user_credentials=str(options.creds),
                name="loopback-tuf-client",
                inbox_prefix=subjects.inbox(subjects.untoken(identity.name)).encode(),
                connect_timeout=3,
                # Without a second attempt nats-py would try the first one for ever.
                max_reconnect_attempts=1,
                reconnect_time_wait=1,
                error_cb=_quiet,
                **tls.options(options.metadata_url, options.ca),
            )
        yield nc
    except TimeoutError:
        raise Refused(
            Code.TUF_UNREACHABLE, f"{options.metadata_url} does not answer", "check the address"
        ) from None
    finally:
        with contextlib.suppress(AssertionError):  # the client's way of saying that it never connected
            await nc.close()


async def _quiet(_: Exception) -> None:
    """Errors reach the caller as exceptions; nats-py would print each a second time."""


def _held(options: argparse.Namespace, sha256: str) -> tuple[Path, bool]:
    """Where the content goes, and whether it is there already."""
    folder: Path = options.target_dir
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / parse.quote(options.target_name, safe="")
    if not file.is_file():
        return file, False
    with file.open("rb") as opened:
        return file, hashlib.file_digest(opened, "sha256").hexdigest() == sha256


def _tls(ca: Path | None) -> Any:
    return tls.context(ca) if ca is not None else None


def _refreshed(repository: TrustedRepository, place: Path) -> int:
    repository.refresh()
    print(f"{place} is up to date", file=sys.stderr)
    return 0


def _said(options: argparse.Namespace, file: Path | None) -> int:
    if file is None:
        raise Refused(
            Code.PACKAGE_UNKNOWN, f"nobody entitled to has signed a target {options.target_name[:200]!r}",
            "check its path",
        )  # fmt: skip
    print(file)
    return 0
