"""Keys of an installation and the trust they found: `loopback keys`.

`init` is the ceremony that makes the first keys and the first repository, which delivery imports into an empty bus
(`<home>/tuf/seed`). Later changes of trust are signed here and published by delivery, which checks them like any client.
docs/keys.md is the manual: ceremony, storage, calendar, and the way back from each lost or stolen key.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from tuf.api.metadata import Root, Targets  # type: ignore[attr-defined]  # re-exported without saying so

from loopback.cli import (
    ceremony,
    changeview,
    context,
    creds,
    keychange,
    keyring,
    keysedit,
    keyshow,
    trustedit,
    trustpublish,
)
from loopback.cli.ceremony import FIRST_FAMILY, init_keys
from loopback.cli.keyring import offline_key, online_key, operator_key
from loopback.cli.keysedit import Offline, PassphraseFile
from loopback.cli.trustpublish import (
    Present,
    encode,
    present_of,
    publish,
    repository,
    repository_at,
    seed_fetch,
)
from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import SigningKey
from loopback.contracts.trustdoc import Role, Trust, TrustDocument
from loopback.services._runtime.settings import read_identity
from loopback.trust import changes, manifest, signing, standing
from loopback.trust.changes import Change
from loopback.trust.repository import TrustedRepository, write_durably

__all__ = [
    "Change",
    "add_family",
    "add_operator",
    "app",
    "encode",
    "init_keys",
    "offline_key",
    "online_key",
    "operator_key",
    "publish",
    "repository",
    "repository_at",
    "seed_fetch",
]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Keys, and who may do what: the root of all trust.",
)

_Keys = Annotated[int, typer.Option(min=1, max=ceremony.MOST_KEYS)]


def add_operator(
    home: Path,
    name: str,
    roles: Mapping[str, Iterable[Role]],
    *,
    repository: TrustedRepository,
    read_blob: Callable[[str, int], bytes],
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> Change:
    """A new trust document in which `name` has these roles by workspace, signed with the targets keys at hand.

    An operator of that name gets these roles instead of the earlier ones and keeps the key; a new one gets a key in
    `home`. `repository` is the verified present state. Raises Refused.
    """
    present = present_of(repository, read_blob)
    known = any(o.name == name for o in present.trust.document.operators)
    public = None if known else keyring.keep(operator_key(home, name), keyring.protection(home)).public.text
    document = trustedit.with_operator(present.trust.document, name, roles, public)
    return trustpublish.sign_at_hand(home, trustedit.change(present, document, f"operator {name}", now))


def add_family(
    home: Path,
    module: str,
    *,
    repository: TrustedRepository,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
) -> Change:
    """Let a new key in `home` sign the releases of the module `module`. Raises Refused where it has one already."""
    manifest.check_module_name(module)
    targets = repository.metadata("targets")
    parsed = signing.parse(Targets, targets)
    known = dict.fromkeys((parsed.delegations.roles if parsed.delegations else None) or {}, b"")
    nobody = Trust(TrustDocument(version=0, operators=(), services={}))
    present = Present(repository.metadata("root"), targets, known, nobody)
    change, _ = keychange.add_family(home, present, module, now=now)
    return trustpublish.sign_at_hand(home, change)


@app.command("init")
def init_command(
    operator: Annotated[
        str, typer.Option(help="Name of the first operator, who may do everything.")
    ] = "admin",
    root_keys: _Keys = 1,
    root_threshold: _Keys = 1,
    targets_keys: _Keys = 1,
    targets_threshold: _Keys = 1,
    offline: Offline = None,
    passphrase_file: PassphraseFile = None,
    each: Annotated[
        bool, typer.Option("--each", help="Ask for a passphrase of its own for every key.")
    ] = False,
    unencrypted: Annotated[
        bool,
        typer.Option(
            "--unencrypted", help="No passphrases: for trying out, as 'loopback up' does it by itself."
        ),
    ] = False,
) -> None:
    """Make every key, and the repository that everything else is trusted by: once, before the first 'loopback up'.

    Root and targets keys, and a key per module family, are encrypted with a passphrase, which it asks for twice, or takes
    from a file. With several --offline folders the keys are dealt out to them in turn.
    """
    ring = keyring.use(passphrase_file, offline or ())
    home = context.home()
    plan = ceremony.Plan(root_keys, root_threshold, targets_keys, targets_threshold)
    plan.check()
    if unencrypted and ring.has_file:
        raise Refused(Code.NAME_INVALID, "--unencrypted takes no passphrase", "leave one of both out")
    if not unencrypted and not (ring.has_file or ring.can_ask):
        raise Refused(
            Code.SIGNATURE_INVALID,
            "there is nobody to choose a passphrase, and keys without one are for trying out only",
            "run it on a terminal, or with --passphrase-file FILE; for trying out, with --unencrypted",
        )
    keyring.offline_folders(home)  # every medium is there before the first key is made
    path = home / "creds" / "activation.creds"
    if not (home / "tuf" / "root.json").exists() and not path.exists():
        creds.init_home(home)

    def protect(name: str) -> bytes | None:
        return ring.choose(name if each else "the new keys", fresh=each)

    files = init_keys(
        home,
        SigningKey.from_nkey(read_identity(path).seed).public.text,
        operator,
        plan=plan,
        protect=keyring.unprotected if unencrypted else protect,
        folders=ring.offline,
    )
    typer.echo(
        f"Made the keys of this installation, {'UNENCRYPTED, for trying out' if unencrypted else 'encrypted'}:\n",
        err=True,
    )
    for file in files:
        typer.echo(f"  {file}\n      {_purpose(file)}", err=True)
    typer.echo(
        f"  {online_key(home, 'snapshot')}\n      delivery signs the set of current files with it (not encrypted)\n"
        f"  {online_key(home, 'timestamp')}\n      delivery says daily with it that nothing newer was hidden (same)\n"
        f"\nRoot needs {root_threshold} of {root_keys} keys, targets {targets_threshold} of {targets_keys}. Whoever has so\n"
        "many can make every host run anything: move them to media that you unplug,\n"
        "apart from each other, and keep copies. Hosts need only tuf/root.json, which is\nno secret.\n"
        "Next: 'loopback keys show', then 'loopback up', or in containers or as units\n"
        "'loopback tls init' and 'loopback bus init'.",
        err=True,
    )


def _purpose(file: Path) -> str:
    if file.parent.name == "operators":
        return "signs your commands"
    if file.name.startswith("root"):
        return "says which keys count at all; used only to replace keys"
    if file.name.startswith("targets"):
        return "signs who may do what, and which key signs which module"
    return f"signs releases of the {FIRST_FAMILY}"


@app.command("new")
def new_command(
    file: Annotated[Path, typer.Argument(help="Where to put it; it must not exist.")],
    passphrase_file: PassphraseFile = None,
    unencrypted: Annotated[
        bool, typer.Option("--unencrypted", help="No passphrase: for delivery's keys, and for trying out.")
    ] = False,
) -> None:
    """Make a key of your own. Give the public half that it prints to whoever signs the trust document."""
    ring = keyring.use(passphrase_file)
    if file.exists():
        raise Refused(Code.NAME_INVALID, f"{file} exists; keys are never overwritten", "name another file")
    key = SigningKey.generate()
    key.save(file, None if unencrypted else ring.choose(file.name))
    typer.echo(key.public.text)
    typer.echo(
        f"made {file}, key id {key.keyid}\n"
        f"Next: somebody with the targets keys runs 'loopback keys operator NAME --role … --public-key {key.public.text}'",
        err=True,
    )


@app.command("passphrase")
def passphrase_command(
    files: Annotated[list[Path], typer.Argument(metavar="FILE…", help="Key files.")],
    passphrase_file: PassphraseFile = None,
    new_passphrase_file: Annotated[
        Path | None, typer.Option(help="File whose first line is the new passphrase, without a terminal.")
    ] = None,
) -> None:
    """Give key files another passphrase, or their first one.

    An old copy keeps the old passphrase, and a file that was not encrypted may still be read off the disk: rotate such a key.
    """
    ring = keyring.use(passphrase_file)
    keys = [ring.open(file) for file in files]
    chosen = (
        keyring.read_passphrase(new_passphrase_file)
        if new_passphrase_file
        else ring.choose(", ".join(file.name for file in files), fresh=True)
    )
    for file, key in zip(files, keys, strict=True):
        key.save(file, chosen)
        SigningKey.load(file, chosen)
        typer.echo(f"{file} is encrypted with the new passphrase", err=True)


@app.command("sign")
def sign_command(
    file: Annotated[Path, typer.Argument(help="A change that 'loopback keys' wrote.")],
    offline: Offline = None,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Add the signatures of the keys at hand to a change, after showing what it does. Needs no connection."""
    keyring.use(passphrase_file, offline or ())
    change = trustpublish.read(file)
    for line in changeview.describe(change, context.home()):
        typer.echo(line)
    before = trustpublish.signatures(change)
    signed = trustpublish.sign_at_hand(context.home(), change)
    added = trustpublish.signatures(signed) - before
    if not added and changes.missing(change):
        raise Refused(
            Code.SIGNATURE_INVALID,
            f"no key at hand counts for what is missing: {changes.missing(change)}",
            "plug in the medium, or name its folder with --offline",
        )
    trustpublish.write(file, signed)
    typer.echo(f"added {added} signatures", err=True)
    typer.echo(trustpublish.next_step(file, changes.missing(signed)), err=True)


@app.command("publish")
def publish_command(
    file: Annotated[Path, typer.Argument(help="A change with every signature.")],
    inbox: Annotated[
        bool,
        typer.Option(
            "--inbox",
            help="Lay it into delivery's folder of this home instead of commanding it: needs no operator's key.",
        ),
    ] = False,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Publish a change that was signed on several machines."""
    keyring.use(passphrase_file)
    change = trustpublish.read(file)
    if inbox:
        path = trustpublish.put_into_inbox(context.home(), change, file.name)
        typer.echo(f"{path}: delivery takes it up within a minute and says so in its log", err=True)
        return
    asyncio.run(_publish(change))
    typer.echo(f"published: {', '.join(sorted(change.metadata))}", err=True)


async def _publish(change: Change) -> None:
    async with context.connect() as session:
        await publish(session, change)
        await asyncio.to_thread(keysedit.settle, session.context.home, change)


@app.command("replace-root")
def replace_root_command(
    root_keys: _Keys = 1,
    root_threshold: _Keys = 1,
    as_of: Annotated[
        int,
        typer.Option(
            metavar="VERSION",
            help="Take the other roles' keys from this root version: a thief of enough root keys signed the later ones.",
        ),
    ] = 0,
    offline: Offline = None,
    passphrase_file: PassphraseFile = None,
) -> None:
    """Found trust anew where too few root keys are left, or too many stolen: a root that every host must be given by hand.

    Nothing vouches for it but you. Hosts that do not have it yet go on enforcing what they have and install nothing new.
    """
    ring = keyring.use(passphrase_file, offline or ())
    home = context.home()
    files = asyncio.run(_stored())
    current = ceremony.root_to_replace(trustpublish.pinned_root(home), files, as_of)
    made = ceremony.replace_root(
        home,
        current,
        plan=ceremony.Plan(root_keys, root_threshold),
        protect=keyring.protection(home),
        folders=ring.offline,
    )
    for path in made:
        typer.echo(f"made {path}", err=True)
    typer.echo(
        f"{home / 'tuf' / 'root.json'} is the new root, version {current.version}.\n"
        "Next: restart delivery, which publishes it; copy root.json to every other service's home and to every host,\n"
        "and restart the agents there. Then compare 'loopback keys show' with the digest of root.json on the hosts.",
        err=True,
    )


@app.command("pin")
def pin_command() -> None:
    """Pin the newest root here and for hosts that are added from now on, instead of the first one.

    For when keys of an older root were stolen: whoever begins with that root could be led astray with them.
    """
    home = context.home()
    files = asyncio.run(_stored())
    pinned = trustpublish.pinned_root(home)
    newest = standing.newest_root(pinned, files)
    trustpublish.repository_at(home, files.get)  # it is a root that a client accepts today
    if newest != pinned:
        write_durably(home / "tuf" / "root.json", newest)
    version = signing.parse(Root, newest).version
    typer.echo(f"{home / 'tuf' / 'root.json'} is root version {version}", err=True)


async def _stored() -> dict[str, bytes]:
    async with context.connect() as session:
        return await trustpublish.stored_files(session)


@app.command("show")
def show_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    offline: Offline = None,
) -> None:
    """Show every role's keys, thresholds and expiry, who may do what, and the rules of workspaces.

    Ends with 1 where something must be renewed soon. Compare the root's digest with what hosts have.
    """
    keyring.use(None, offline or ())
    shown = keyshow.look(context.home(), datetime.now(UTC))
    typer.echo(keyshow.as_json(shown) if as_json else "\n".join(keyshow.as_text(shown)))
    if said := keyshow.warnings(shown):
        for line in said:
            typer.echo(f"warning: {line}", err=True)
        raise typer.Exit(1)


app.command("operator")(keysedit.operator_command)
app.command("workspace")(keysedit.workspace_command)
app.command("family")(keysedit.family_command)
app.command("renew")(keysedit.renew_command)
app.command("rotate")(keysedit.rotate_command)
app.command("revoke")(keysedit.revoke_command)
