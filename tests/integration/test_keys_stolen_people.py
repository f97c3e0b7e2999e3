"""An operator's or service's key stolen, and brokers that lie about what became of a change: the way back (docs/keys.md)."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from support_keys import Installation, now
from tuf.api.metadata import Targets

from loopback.cli import context, keychange, keys, module, trustpublish
from loopback.cli import home as installation
from loopback.contracts import subjects, trustdoc
from loopback.contracts.codes import Code, Refused
from loopback.contracts.keys import SigningKey
from loopback.contracts.trustdoc import Operator, Role
from loopback.trust import signing

pytestmark = pytest.mark.broker


async def test_a_stolen_operators_key_is_taken_out_by_name_or_by_its_id(place: Installation) -> None:
    await place.done("keys", "operator", "ann", "--role", "releaser")
    await place.done("keys", "operator", "bob", "--role", "releaser")
    ann = place.context()._replace(operator_key=keys.operator_key(place.home, "ann"))
    bob = place.key("operators", "bob").keyid
    installation.begin(place.home, None)
    async with context.connect(ann) as session:
        await module.publish(session, place.package("1.1.0"))  # she may
        await place.done("keys", "revoke", "operator", "ann")
        await place.done("keys", "revoke", bob[:16])
        with pytest.raises(Refused) as caught:
            await module.publish(session, place.package("1.2.0"))
    assert caught.value.code == Code.SIGNATURE_UNKNOWN_KEY
    code, said = await place.loopback("keys", "revoke", "operator", "admin")
    assert (code, "nobody would be admin" in said) == (2, True)
    assert subjects.tuf_name("lb.tuf.x.y") is None


@pytest.mark.parametrize("what", [("root",), ("activation",), ("operator", "admin")])
async def test_a_stolen_broker_that_says_refused_of_what_it_published_costs_nobody_a_key(
    what: tuple[str, ...], place: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = context.Session.send

    async def lying(*arguments: object, **options: object) -> object:
        await honest(*arguments, **options)  # type: ignore[arg-type]
        raise Refused(Code.TUF_CONFLICT, "a later version was published meanwhile")

    before = await place.published()
    keys_before = {path for path in place.home.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(context.Session, "send", lying)
        code, said = await place.loopback("keys", "rotate", *what)
    assert (code, "tuf.conflict" in said) == (2, True)
    assert await place.published() != before, "it was published all the same"
    made = {path for path in place.home.rglob("*") if path.is_file()} - keys_before
    (new,) = (path for path in made if path.suffix in (".pem", ".new"))
    assert f"kept {new}" in said
    if what == ("root",):  # without that key nobody could ever replace a key again
        assert await place.done("keys", "renew", "root")


async def test_a_key_of_which_no_signature_left_the_machine_is_taken_away_again(
    place: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unplugged(*_: object) -> None:
        raise Refused(Code.SIGNATURE_INVALID, "the medium is gone")

    kept = set(place.home.rglob("*.pem"))
    monkeypatch.setattr(trustpublish, "sign_at_hand", unplugged)
    code, said = await place.loopback("keys", "rotate", "root")
    assert (code, "the medium is gone" in said) == (2, True)
    assert set(place.home.rglob("*.pem")) == kept


async def test_activations_new_key_that_waits_for_signatures_outlives_a_second_attempt(
    place: Installation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await place.loopback("keys", "rotate", "activation", "--out", tmp_path / "a.change")
    waiting = (place.home / "creds" / "activation.creds.new").read_bytes()
    with monkeypatch.context() as patch:

        def unplugged(*_: object) -> None:
            raise Refused(Code.SIGNATURE_INVALID, "the medium is gone")

        patch.setattr(trustpublish, "sign_at_hand", unplugged)
        await place.loopback("keys", "rotate", "activation")
    assert (place.home / "creds" / "activation.creds.new").read_bytes() == waiting
    await place.done("keys", "publish", tmp_path / "a.change")
    assert (place.home / "creds" / "activation.creds").read_bytes() == waiting


async def test_a_key_that_counts_in_several_ways_counts_in_none_after_its_revocation(
    place: Installation, tmp_path: Path
) -> None:
    shared = tmp_path / "shared.pem"
    public = (await place.done("keys", "new", shared, "--unencrypted")).split()[0]
    await place.done("keys", "operator", "ann", "--role", "releaser", "--public-key", public)
    await place.done("keys", "rotate", "firewall", "--public-key", public, "--offline", tmp_path)
    await place.done("keys", "rotate", "root", "--public-key", public, "--offline", tmp_path)
    keyid = SigningKey.load(shared).keyid
    said = await place.done("keys", "revoke", keyid, "--keep-all", "--offline", tmp_path)
    assert "counts no longer" in said
    async with context.connect(place.context()) as session:
        present = await trustpublish.present(session)
    with pytest.raises(Refused, match="no key that counts"):
        keychange.locate(present, keyid)


async def test_a_stolen_broker_cannot_lead_the_command_back_before_a_revocation_that_it_saw(
    place: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It withholds the root that revoked a stolen targets key, and has that key make an operator."""
    stolen = place.key("offline", "targets")
    await place.done("keys", "revoke", stolen.keyid)
    async with context.connect(place.context()) as session:
        honest = await trustpublish.present(session)
        mallory = Operator("mallory", SigningKey.generate().public.text, {"*": (Role.ADMIN,)})
        document = msgspec.structs.replace(
            honest.trust.document, version=9, operators=(*honest.trust.document.operators, mallory)
        )
        data = msgspec.json.encode(document)
        await session.put_blob(data)
        targets = signing.renewed(signing.parse(Targets, honest.targets), now())
        targets.targets[trustdoc.TARGET] = signing.target(trustdoc.TARGET, data)
        forged = {name: d for name, d in honest.files.items() if name != "2.root.json"}
        forged[signing.filename("targets", targets.version)] = signing.sign(targets, stolen)
        forged["timestamp.json"] = b"{}"  # no client accepts it: the command builds on people's signatures

        async def withheld(_: object) -> dict[str, bytes]:
            return forged

        monkeypatch.setattr(trustpublish, "stored_files", withheld)
        found = await trustpublish.present(session)
    assert not found.verified
    assert (found.root, found.targets) == (honest.root, honest.targets)
    assert "mallory" not in {operator.name for operator in found.trust.document.operators}
