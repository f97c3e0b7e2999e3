"""What `workspace put` says: rules come from the trust document, never from the environment's name."""

from __future__ import annotations

from loopback.cli import workspace
from loopback.contracts.codes import Code, Refused
from loopback.contracts.trustdoc import Floor, Trust, TrustDocument, WorkspaceRules


def said(**rules: WorkspaceRules) -> str:
    return workspace.governed(
        "prod", Trust(TrustDocument(version=1, operators=(), services={}, workspaces=rules))
    )


def test_a_regulated_workspace_says_what_follows() -> None:
    words = said(
        prod=WorkspaceRules(
            regulated=True, publishers={"firewall": ("f" * 64,)}, floors={"firewall": Floor("1.2")}
        )
    )
    assert words.startswith("it is regulated: a rollout also needs 'loopback rollout approve'")
    assert "firewall from 1.2 on" in words and "firewall by 1 pinned publishers" in words


def test_an_environment_alone_is_no_rule() -> None:
    assert "its environment is a label and no rule" in said()


def test_without_a_trust_document_it_says_so_and_guesses_nothing() -> None:
    words = workspace.governed("prod", Refused(Code.TUF_UNREACHABLE, "the bus is away"))
    assert "cannot be said: the bus is away" in words
