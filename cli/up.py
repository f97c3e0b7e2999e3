"""`loopback up` and `loopback service`: run the whole control plane here, or one service of it."""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Final

import typer

from loopback.cli import context, supervise
from loopback.contracts import subjects
from loopback.contracts.codes import Code, Refused
from loopback.services._runtime import service
from loopback.services._runtime.settings import Settings

_OTLP_HELP: Final = (
    "Base address of an OTLP/HTTP receiver for spans and metrics, for example http://127.0.0.1:4318."
)
_OTLP_VARIABLE: Final = "OTEL_EXPORTER_OTLP_ENDPOINT"


def up_command(
    listen: Annotated[str, typer.Option(help="Where the broker listens, host:port.")] = "127.0.0.1:4222",
    replicas: Annotated[int, typer.Option(min=1, max=9, help="Processes of each service.")] = 1,
    no_services: Annotated[
        bool, typer.Option("--no-services", help="Only the broker; run services with 'loopback service'.")
    ] = False,
    tls: Annotated[
        bool,
        typer.Option(
            "--tls",
            help="Encrypt the broker's connections, with certificates made and renewed here. It stays so.",
        ),
    ] = False,
    otlp_endpoint: Annotated[str, typer.Option(envvar=_OTLP_VARIABLE, help=_OTLP_HELP)] = "",
) -> None:
    """Run the broker and the four services on this machine until Ctrl-C.

    The first time it makes keys, credentials and the trust document below --home. Nothing else is needed.
    """
    _log_to_stderr(logging.WARNING)
    services = () if no_services else subjects.SERVICES
    asyncio.run(_up(context.home(), listen, replicas, services, otlp_endpoint, tls=tls))


async def _up(
    home: Path, listen: str, replicas: int, services: tuple[str, ...], otlp: str, *, tls: bool
) -> None:
    began = time.monotonic()
    asked, serving = asyncio.Event(), asyncio.Event()
    main = asyncio.current_task()
    assert main is not None

    def stop() -> None:
        if not asked.is_set() and not serving.is_set():
            main.cancel()  # still starting: whoever asks to stop is heard, too
        asked.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop)

    def say(words: str) -> None:
        typer.echo(f"[{time.monotonic() - began:6.1f} s] {words}", err=True)

    try:
        async with supervise.running(
            home, listen=listen, replicas=replicas, services=services, otlp=otlp, tls=tls, say=say
        ):
            serving.set()
            say("ready; Ctrl-C stops it. Next, in another terminal: loopback workspace put NAME")
            await asked.wait()
            say("stopping: services first, then the broker")
    except asyncio.CancelledError:
        if not asked.is_set():
            raise
    say("stopped")


def service_command(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(subjects.SERVICES)}.")],
    url: Annotated[
        str, typer.Option(help="The broker's address, several with commas; default: the installation's.")
    ] = "",
    creds: Annotated[
        Path | None, typer.Option(help="Credentials file; default: the installation's for this service.")
    ] = None,
    root: Annotated[Path | None, typer.Option(help="Pinned TUF root; default: the installation's.")] = None,
    ca: Annotated[
        Path | None,
        typer.Option(
            help="Certificate authority of the broker, with a tls:// URL; default: the installation's."
        ),
    ] = None,
    instance: Annotated[str, typer.Option(help="Tells replicas on one home apart.")] = "1",
    http_host: Annotated[str, typer.Option(help="Where it serves /livez, /readyz, /metrics.")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any free port.")] = 0,
    otlp_endpoint: Annotated[str, typer.Option(envvar=_OTLP_VARIABLE, help=_OTLP_HELP)] = "",
) -> None:
    """Run one service until SIGTERM; any number of replicas may run, here and elsewhere."""
    if name not in subjects.SERVICES:
        raise Refused(
            Code.NAME_INVALID,
            f"there is no service {name!r}",
            f"choose one of {', '.join(subjects.SERVICES)}",
        )
    _log_to_stderr(logging.INFO)
    home = context.home()
    settings = Settings(
        url=url or context.load().url,
        creds=creds or home / "creds" / f"{name}.creds",
        home=home,
        root=root,
        ca=ca,
        otlp_endpoint=otlp_endpoint,
        http_host=http_host,
        http_port=http_port,
        instance=instance,
    )
    # By name, so that the operator's command depends on no service; a service brings its own dependencies.
    start: service.Start = importlib.import_module(f"loopback.services.{name}.app").start
    asyncio.run(service.run(name, settings, start))


def _log_to_stderr(level: int) -> None:
    """Plain lines for people; `LOOPBACK_LOG` names another level."""
    wanted = logging.getLevelNamesMapping().get(os.environ.get("LOOPBACK_LOG", "").upper(), level)
    logging.basicConfig(
        stream=sys.stderr,
        level=wanted,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    logging.getLogger("aiohttp").setLevel(logging.WARNING)
