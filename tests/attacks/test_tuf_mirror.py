"""A mirror in the wrong hands, over HTTP, against the verifying client that the hosts use."""

from __future__ import annotations

from pathlib import Path

import pytest
from support_simulator import Simulator, TufClient, serving
from support_victim import anybody_may_sign

from loopback.contracts.codes import Code, Refused
from loopback.trust import http, repository
from loopback.trust.repository import TrustedRepository

EVIL = b"evil\n"


def download(client: TufClient, path: str) -> bytes:
    """What lies where the client's user will look for it."""
    found = TrustedRepository(client.metadata, http.fetcher(f"{client._url}/metadata/"))
    place = found.download(path, http.fetcher(f"{client._url}/targets/"), client.artifacts)
    return place.read_bytes()


def test_malicious_mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mirror serves a file that the repository's owners never signed, with metadata to match or without."""
    owners = Simulator()
    owners.add("targets", "tool", b"good\n")
    owners.publish("targets", "snapshot", "timestamp")
    root = owners._published["root"][0]
    with serving() as server:
        server.add(owners)

        def fresh(name: str) -> TufClient:
            client = TufClient(tmp_path / name, server.url + "/r0")
            assert client.init(root) == 0
            return client

        owners.content["tool"] = EVIL
        with monkeypatch.context() as patch:
            patch.setattr(repository, "_matches", lambda entry, data: True)
            assert download(fresh("one without"), "tool") == EVIL
        client = fresh("one")
        with pytest.raises(Refused, match="is not what was signed") as caught:
            download(client, "tool")
        assert caught.value.code == Code.BLOB_DIGEST
        assert client.downloaded() == []

        # With metadata of its own, it lacks the keys.
        for role in ("targets", "snapshot", "timestamp"):
            owners.signers[role] = [owners.fresh()]
        owners.add("targets", "tool", EVIL)
        owners.publish("targets", "snapshot", "timestamp")
        with monkeypatch.context() as patch:
            anybody_may_sign(patch)
            assert download(fresh("two without"), "tool") == EVIL
        client = fresh("two")
        with pytest.raises(Refused, match="timestamp was signed by 0/1 keys") as caught:
            download(client, "tool")
        assert caught.value.code == Code.TUF_INVALID
        assert client.downloaded() == []
