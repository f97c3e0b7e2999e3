"""The installation's own certificate authority, and its servers' certificates.

    <folder>/ca.pem, ca.key      the authority; who has the key can be any server of this installation
    <folder>/<name>.pem, .key    one server each

Certificates are X.509 with ECDSA on P-256, which every TLS library speaks. The authority signs servers only (path length 0),
and a server's certificate is good for both ends of a route between servers.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from loopback.cli.context import write_secret
from loopback.contracts.codes import Code, Refused

CA_LIFE: Final = timedelta(days=3650)  # hosts hold it: a new one has to be brought to all of them
SERVER_LIFE: Final = timedelta(days=90)
RENEW_BEFORE: Final = timedelta(
    days=30
)  # a third of its life is left, so that two missed renewals do no harm
BACKDATED: Final = timedelta(minutes=5)  # for clocks that are a little behind

_LABEL = re.compile(
    r"(\*\.)?([a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?\.)*[a-zA-Z0-9]([a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
)


def make_authority(folder: Path, now: datetime | None = None) -> bool:
    """Make ca.pem and ca.key where there are none; whether they are new. Raises Refused where only one is there."""
    have = [path for path in (folder / "ca.pem", folder / "ca.key") if path.exists()]
    if len(have) == 2:
        return False
    if have:
        raise Refused(
            Code.CONFIG_INVALID, f"{have[0]} is there, but not the other half", "bring ca.key back, or start in an empty folder"
        )  # fmt: skip
    now = now or datetime.now(UTC)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Loopback Modules: this installation")])
    certificate = (
        _builder(name, name, key, now, CA_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    _save(folder, "ca", certificate, key)
    return True


def issue(
    folder: Path, name: str, names: Sequence[str], now: datetime | None = None, life: timedelta = SERVER_LIFE
) -> Path:
    """A new key and certificate for the server `name`, good for these DNS names and addresses; the certificate's path.

    Raises Refused(NAME_INVALID | CONFIG_INVALID).
    """
    now = now or datetime.now(UTC)
    if not re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,62}", name) or name == "ca":
        raise Refused(
            Code.NAME_INVALID,
            f"{name!r} cannot name a server's files",
            "begin with a DNS name such as nats-1",
        )
    try:
        signer = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
        signing = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    except FileNotFoundError as error:
        raise Refused(
            Code.CONFIG_INVALID,
            f"there is no {error.filename}",
            "make the authority with 'loopback tls init'",
        ) from None
    except ValueError as error:
        raise Refused(Code.CONFIG_INVALID, f"{folder}: the authority cannot be read: {error}") from None
    assert isinstance(signing, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    certificate = (
        _builder(subject, signer.subject, key, now, min(life, signer.not_valid_after_utc - now))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([_general(one) for one in names]), critical=False)
        .add_extension(_usage(sign=False), critical=True)
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
            critical=False,
        )
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signing.public_key()), critical=False
        )
        .sign(signing, hashes.SHA256())
    )
    _save(folder, name, certificate, key)
    return folder / f"{name}.pem"


def servers(folder: Path) -> dict[str, x509.Certificate]:
    """The servers' certificates in a folder, by name."""
    found = {}
    for path in sorted(folder.glob("*.pem")):
        if path.stem != "ca":
            try:
                found[path.stem] = x509.load_pem_x509_certificate(path.read_bytes())
            except ValueError as error:
                raise Refused(Code.CONFIG_INVALID, f"{path} is no certificate: {error}") from None
    return found


def names_of(certificate: x509.Certificate) -> list[str]:
    """What a certificate is good for."""
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [*found.get_values_for_type(x509.DNSName), *map(str, found.get_values_for_type(x509.IPAddress))]


def due(certificate: x509.Certificate, now: datetime) -> bool:
    """Whether it is time to renew it."""
    return certificate.not_valid_after_utc - now < RENEW_BEFORE


def keep(folder: Path, name: str, names: Sequence[str]) -> bool:
    """Have an authority and a certificate for this server that is good for these names and a while; whether one was made."""
    have = servers(folder).get(name)
    if have is not None and set(names) <= set(names_of(have)) and not due(have, datetime.now(UTC)):
        return False
    make_authority(folder)
    issue(folder, name, names)
    return True


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, now: datetime, life: timedelta
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder(
            subject_name=subject,
            issuer_name=issuer,
            public_key=key.public_key(),
            serial_number=x509.random_serial_number(),
            not_valid_before=now - BACKDATED,
            not_valid_after=now + life,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )  # fmt: skip


def _usage(*, sign: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign, key_cert_sign=sign, crl_sign=sign, content_commitment=False, key_encipherment=False,
        data_encipherment=False, key_agreement=False, encipher_only=False, decipher_only=False,
    )  # fmt: skip


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    if len(name) > 253 or not _LABEL.fullmatch(name):
        raise Refused(
            Code.NAME_INVALID,
            f"{name!r} is neither a DNS name nor an address",
            "write nats-1.example or 192.0.2.7",
        )
    return x509.DNSName(name)


def _save(folder: Path, name: str, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    write_secret(folder / f"{name}.key", pem.decode())
    write_secret(folder / f"{name}.pem", certificate.public_bytes(serialization.Encoding.PEM).decode())
    (folder / f"{name}.pem").chmod(0o644)  # public, and read by whoever connects
