"""Signatures: what they cover, whose they are, and that what is no signature is one finding and never an exception."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ingot.artifacts.errors import UsageError
from ingot.artifacts.files import replace_file
from ingot.artifacts.manifest import SIGNATURE, UNLISTED
from ingot.artifacts.signature import make_payload, write_bundle
from ingot.artifacts.store import OpenArtifact, open_artifact
from ingot.runtime.keys import check_signature, key_id, sign

from .plan_artifact import write_plan_artifact

PEM = serialization.Encoding.PEM


def write_key(folder: Path, name: str, private: Any = None, password: bytes = b"") -> tuple[Path, Path]:
    """A pair of key files: private, public."""
    private = private or ec.generate_private_key(ec.SECP256R1())
    encryption = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    (folder / f"{name}.pem").write_bytes(
        private.private_bytes(PEM, serialization.PrivateFormat.PKCS8, encryption),
    )
    (folder / f"{name}.pub").write_bytes(
        private.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return folder / f"{name}.pem", folder / f"{name}.pub"


def never() -> bytes:
    raise AssertionError("nobody asked for a password")


@pytest.fixture()
def signed(tmp_path: Path) -> tuple[OpenArtifact, Path]:
    """A signed artifact with one unlisted file, and its public key."""
    root = write_plan_artifact(tmp_path / "a")
    (root / "report").mkdir(exist_ok=True)
    (root / UNLISTED[0]).write_text("made there and then")
    private, public = write_key(tmp_path, "maker")
    artifact = open_artifact(root)
    replace_file(artifact.root / SIGNATURE, write_bundle(sign(make_payload(artifact.root, "a"), private, never)))
    return open_artifact(root), public


def test_a_signed_artifact_is_intact_and_signed(signed: tuple[OpenArtifact, Path]) -> None:
    artifact, public = signed
    assert check_signature(artifact, [public]) == (public, [])


@pytest.mark.parametrize("curve", [ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def test_every_curve_signs(signed: tuple[OpenArtifact, Path], tmp_path: Path, curve: ec.EllipticCurve) -> None:
    artifact, first = signed
    private, public = write_key(tmp_path, "other", ec.generate_private_key(curve), b"secret")
    bundle = sign(make_payload(artifact.root, "a"), private, lambda: b"secret")
    assert bundle.key_id == key_id(public)
    (artifact.root / SIGNATURE).write_bytes(write_bundle(bundle))
    assert check_signature(artifact, [first, public]) == (public, [])
    signer, [finding] = check_signature(artifact, [first])
    assert signer is None and "signed by another key" in finding.problem and key_id(public)[:16] in finding.problem


def edit_payload(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    """A change of the statement, under the signature of what it was."""

    def apply(root: Path) -> None:
        bundle = json.loads((root / SIGNATURE).read_text())
        statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
        change(statement)
        bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement, indent=1).encode()).decode()
        (root / SIGNATURE).write_text(json.dumps(bundle))

    return apply


def edit_bundle(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        bundle = json.loads((root / SIGNATURE).read_text())
        change(bundle)
        (root / SIGNATURE).write_text(json.dumps(bundle))

    return apply


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no signature": (lambda r: (r / SIGNATURE).unlink(), "not signed"),
    "empty": (lambda r: (r / SIGNATURE).write_text(""), "not JSON"),
    "a list": (lambda r: (r / SIGNATURE).write_text("[]"), "mediaType"),
    "a symlink": (lambda r: ((r / SIGNATURE).rename(r.parent / "s"), (r / SIGNATURE).symlink_to(r.parent / "s")),
                  "symbolic link"),
    "a provenance that was changed": (lambda r: (r / UNLISTED[0]).write_text("made elsewhere"), UNLISTED[0]),
    "a provenance that was removed": (lambda r: (r / UNLISTED[0]).unlink(), "signed, but missing"),
    "a log that was added": (lambda r: (r / UNLISTED[2]).write_text("x"), "not signed: it was added later"),
    "an empty log that was added": (lambda r: (r / UNLISTED[2]).touch(), "not signed: it was added later"),
    "a folder and a file that were added": (lambda r: ((r / "x").mkdir(), (r / "x/y").touch()), "x/y"),
    "a manifest with other spaces": (lambda r: (r / "manifest.json").write_text(
        json.dumps(json.loads((r / "manifest.json").read_text()))), "manifest.json"),
    "a statement that was changed": (edit_payload(lambda s: s["subject"][0].update(name="b")), "changed since"),
    "a statement of less": (edit_payload(lambda s: s["predicate"]["resources"].pop()), "changed since"),
    "another payload type": (edit_bundle(lambda b: b["dsseEnvelope"].update(payloadType="text/plain")), "payloadType"),
    "two signatures": (edit_bundle(lambda b: b["dsseEnvelope"]["signatures"].append({"sig": ""})), "found 2"),
    "no base64": (edit_bundle(lambda b: b["dsseEnvelope"].update(payload="%")), "base64"),
    "no signature in it": (edit_bundle(lambda b: b["dsseEnvelope"]["signatures"][0].pop("sig")), "sig"),
    "a certificate": (edit_bundle(lambda b: b.update(verificationMaterial={"certificate": {}})), "certificate"),
    "another bundle": (edit_bundle(lambda b: b.update(mediaType="application/json")), "mediaType"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_not_as_it_was_signed_is_found(signed: tuple[OpenArtifact, Path], name: str) -> None:
    artifact, public = signed
    change, word = CHANGES[name]
    change(artifact.root)
    _, findings = check_signature(artifact, [public])
    assert len(findings) == 1
    assert word in str(findings[0]) and findings[0].fix


@pytest.mark.parametrize("change", [
    lambda s: s["predicate"]["resources"].append(s["predicate"]["resources"][0]),
    lambda s: s["predicate"]["resources"][0].update(algorithm="md5"),
    lambda s: s["predicate"]["serialization"].update(method="shards"),
    lambda s: s.update(predicateType="https://example.com"),
    lambda s: s.update(_type=3),
    lambda s: s.update(predicate=[]),
])  # fmt: skip
def test_a_statement_of_another_kind_is_refused_though_it_is_signed(
    signed: tuple[OpenArtifact, Path], tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    artifact, public = signed
    statement = json.loads(make_payload(artifact.root, "a"))
    change(statement)
    bundle = sign(json.dumps(statement).encode(), tmp_path / "maker.pem", never)
    (artifact.root / SIGNATURE).write_bytes(write_bundle(bundle))
    signer, findings = check_signature(artifact, [public])
    assert signer is None and len(findings) == 1


def test_a_manifest_that_changed_after_it_was_read_is_found(signed: tuple[OpenArtifact, Path]) -> None:
    artifact, public = signed
    path = artifact.root / "manifest.json"
    text = path.read_text()
    path.write_text(text.replace('"name": "', '"name": "x', 1))
    _, [finding] = check_signature(OpenArtifact(artifact.root, artifact.manifest), [public])
    assert finding.path == "manifest.json"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 1 << 20), value=st.integers(0, 255))
def test_one_changed_byte_never_passes_as_another_statement(
    signed: tuple[OpenArtifact, Path], position: int, value: int
) -> None:
    artifact, public = signed
    content = (artifact.root / SIGNATURE).read_bytes()
    broken = bytearray(content)
    broken[position % len(content)] = value
    try:
        (artifact.root / SIGNATURE).write_bytes(broken)
        signer, findings = check_signature(artifact, [public])
        # Spaces, the key's hint and the unused keyid are not signed; what is signed is what counts.
        assert signer == public if not findings else signer is None
    finally:
        (artifact.root / SIGNATURE).write_bytes(content)


@pytest.mark.parametrize("content", [b"", b"no key", b"\xff" * 100, bytes(1 << 20)])
def test_a_file_that_is_no_key_is_a_usage_error(
    signed: tuple[OpenArtifact, Path], tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(UsageError, match="bad"):
        check_signature(signed[0], [tmp_path / "bad"])
    with pytest.raises(UsageError, match="bad"):
        sign(b"", tmp_path / "bad", never)


def test_keys_of_another_kind_and_wrong_passwords_are_usage_errors(
    signed: tuple[OpenArtifact, Path], tmp_path: Path
) -> None:
    private, public = write_key(tmp_path, "edwards", ed25519.Ed25519PrivateKey.generate())
    with pytest.raises(UsageError, match="P-256"):
        sign(b"", private, never)
    with pytest.raises(UsageError, match="P-256"):
        check_signature(signed[0], [public])
    private, _ = write_key(tmp_path, "locked", password=b"right")
    with pytest.raises(UsageError, match="password is wrong"):
        sign(b"", private, lambda: b"wrong")
    with pytest.raises(UsageError, match="No such file"):
        check_signature(signed[0], [tmp_path / "absent.pub"])
    with pytest.raises(UsageError, match="no public key"):
        check_signature(signed[0], [private])
