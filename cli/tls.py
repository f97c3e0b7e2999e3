"""`loopback tls`: certificates for the broker, from a certificate authority of the installation's own."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from loopback.cli import certificates

app = typer.Typer(
    no_args_is_help=True,
    help="Certificates for the broker, from an authority of your own. 'loopback up --tls' needs none of this.",
)
Out = Annotated[Path, typer.Option("--out", help="The folder of ca.pem, ca.key and the servers' files.")]


@app.command("init")
def init_command(
    out: Out,
    host: Annotated[
        list[str],
        typer.Option(
            "--host",
            help="A server and the names and addresses it is reached by: nats-1,10.0.0.1. Repeat it.",
        ),
    ],
) -> None:
    """Make an authority, where there is none, and a certificate for each server; prints the paths.

    Servers get their own .pem and .key; services, operators and hosts get ca.pem (host.toml: ca, service: --ca). Keep ca.key
    away from servers: it is needed for renewals only.
    """
    if certificates.make_authority(out):
        typer.echo(
            f"made an authority; {out / 'ca.key'} can be any server of yours: keep it offline", err=True
        )
    for one in host:
        names = [name.strip() for name in one.split(",") if name.strip()]
        typer.echo(certificates.issue(out, names[0] if names else "", names))
    typer.echo(
        f"they end in {certificates.SERVER_LIFE.days} days; next: loopback tls renew --out {out}, once a month",
        err=True,
    )


@app.command("renew")
def renew_command(
    out: Out,
    every: Annotated[
        bool, typer.Option("--all", help="Also those that have more than 30 days left.")
    ] = False,
) -> None:
    """Give new certificates and keys to servers whose own end within 30 days; prints their paths.

    Copy them to their servers and have these read them: 'systemctl reload loopback-nats' or SIGHUP. Connections stay up.
    """
    for name, certificate in certificates.servers(out).items():
        if every or certificates.due(certificate, datetime.now(UTC)):
            typer.echo(certificates.issue(out, name, certificates.names_of(certificate)))
        else:
            typer.echo(f"{name} is good until {certificate.not_valid_after_utc:%Y-%m-%d}", err=True)
