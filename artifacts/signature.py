"""A signature over an artifact's whole folder, in OpenSSF model-signing's format: what is signed, and how it is stored.

`model.sig` is a sigstore bundle with a DSSE envelope around an in-toto statement that names every file in the folder
with its sha256. The manifest is one of them, and it covers the large files by digests that are compared while they are
loaded: so a signature costs no second reading. Keys and cryptography are in runtime/keys.py.

Formats: https://github.com/sigstore/model-transparency (predicate v1.0), https://github.com/secure-systems-lab/dsse
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

from . import strict
from .files import read_small
from .fingerprint import sha256_files
from .folder import Finding, scan
from .manifest import FILE_NAME, SIGNATURE, UNLISTED, Manifest

BUNDLE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://model_signing/signature/v1.0"
_SIGN_AGAIN = "sign it again with `ingot sign`, or fetch an intact copy of the artifact"


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A signature as it was read; nothing in it has been verified.

    `payload` is the statement as signed, `signature` the ECDSA signature over `pae(payload)`, and `key_id` the sha256
    of the public key in PEM, empty if the signer did not say.
    """

    payload: bytes
    signature: bytes
    key_id: str


def pae(payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding: the bytes that are signed."""
    return b"DSSEv1 %d %s %d %s" % (len(PAYLOAD_TYPE), PAYLOAD_TYPE.encode(), len(payload), payload)


def make_payload(root: Path, name: str) -> bytes:
    """The statement to sign: every file in the folder `root` but the signature itself, with its sha256.

    Raises:
        VerificationError, ResourceError: as `sha256_files`.
    """
    paths = [path for path, status in scan(root).items() if _is_file(status) and path != SIGNATURE]
    digests = sha256_files(root / path for path in paths)
    resources = [{"name": p, "algorithm": "sha256", "digest": digests[root / p]} for p in sorted(paths)]
    together = hashlib.sha256(b"".join(bytes.fromhex(entry["digest"]) for entry in resources)).hexdigest()
    serialization = {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": [SIGNATURE]}
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": together}}],
        "predicateType": PREDICATE_TYPE,
        "predicate": {"serialization": serialization, "resources": resources},
    }
    return json.dumps(statement, indent=1).encode()


def write_bundle(bundle: Bundle) -> bytes:
    """The content of `model.sig`."""
    envelope = {
        "payload": base64.b64encode(bundle.payload).decode(),
        "payloadType": PAYLOAD_TYPE,
        "signatures": [{"sig": base64.b64encode(bundle.signature).decode(), "keyid": ""}],
    }
    material = {"publicKey": {"hint": bundle.key_id}, "tlogEntries": []}
    value = {"mediaType": BUNDLE_TYPE, "verificationMaterial": material, "dsseEnvelope": envelope}
    return (json.dumps(value, indent=1) + "\n").encode()


def read_bundle(root: Path) -> Bundle:
    """The signature that lies in the folder `root`; nothing of it is believed yet.

    Raises:
        VerificationError: there is none, or it is not of this format.
        ResourceError: the system does not let us read it.
    """
    source = str(root / SIGNATURE)
    value = strict.read_json(read_small(root / SIGNATURE, strict.MAX_BYTES), source)
    if _take(value, source, "mediaType") != BUNDLE_TYPE:
        strict.refuse(source, "mediaType", f"{strict.quote(value['mediaType'])} is not {BUNDLE_TYPE}")
    envelope = _take(value, source, "dsseEnvelope")
    if _take(envelope, source, "payloadType") != PAYLOAD_TYPE:
        strict.refuse(source, "payloadType", f"{strict.quote(envelope['payloadType'])} is not {PAYLOAD_TYPE}")
    signatures = _take(envelope, source, "signatures", list)
    if len(signatures) != 1:
        strict.refuse(source, "signatures", f"expected one signature, found {len(signatures)}")
    material = _take(value, source, "verificationMaterial")
    if not isinstance(material, dict) or "publicKey" not in material:
        strict.refuse(source, "verificationMaterial", "it is signed by a certificate, and not by a key")
    key = _take(material, source, "publicKey", dict)
    key_id = _take(key, source, "hint", str) if key.get("hint") is not None else ""
    return Bundle(_bytes(envelope, source, "payload"), _bytes(signatures[0], source, "sig"), key_id)


def compare_signed(root: Path, manifest: Manifest, payload: bytes) -> list[Finding]:
    """What of the folder is not as a verified statement says; empty when all is.

    The files that the manifest lists are left to whoever compares their digests with the manifest's, the very one
    whose bytes are compared here.

    Args:
        payload: of a bundle whose signature has been verified.

    Raises:
        VerificationError: the statement is not one of model-signing's.
    """
    signed = _signed_digests(payload, f"the statement in {root / SIGNATURE}")
    listed = {entry.path for entry in manifest.files}
    present = {path for path, status in scan(root).items() if _is_file(status)} - {SIGNATURE}
    findings = [
        Finding(_shown(path), "not signed: it was added later", _SIGN_AGAIN) for path in present - signed.keys()
    ]
    findings += [Finding(_shown(path), "signed, but missing", _SIGN_AGAIN) for path in signed.keys() - present]
    here = [path for path in sorted(present & signed.keys() - listed - {FILE_NAME}) if path in UNLISTED]
    digests = sha256_files(root / path for path in here)
    wrong = [path for path in here if digests[root / path] != signed[path]]
    if signed.get(FILE_NAME) != _manifest_digest(root, manifest):
        wrong.append(FILE_NAME)
    findings += [Finding(path, "its content is not what was signed", _SIGN_AGAIN) for path in wrong]
    return sorted(findings, key=lambda finding: finding.path)


def _manifest_digest(root: Path, manifest: Manifest) -> str:
    """sha256 of manifest.json, if those bytes say what `manifest` says; empty if the file is another one by now."""
    content = read_small(root / FILE_NAME, strict.MAX_BYTES)
    same = Manifest.from_json(content, str(root / FILE_NAME)) == manifest
    return hashlib.sha256(content).hexdigest() if same else ""


def _signed_digests(payload: bytes, source: str) -> dict[str, str]:
    """Path to sha256 of everything a statement names."""
    value = strict.read_json(payload, source)
    if _take(value, source, "_type") != STATEMENT_TYPE or _take(value, source, "predicateType") != PREDICATE_TYPE:
        strict.refuse(source, "predicateType", f"it is no statement of type {PREDICATE_TYPE}")
    predicate = _take(value, source, "predicate")
    method = _take(predicate, source, "serialization")
    if (_take(method, source, "method"), method.get("hash_type")) != ("files", "sha256"):
        strict.refuse(source, "serialization", "only whole files with sha256 are understood")
    signed: dict[str, str] = {}
    for entry in _take(predicate, source, "resources", list):
        name = _take(entry, source, "name", str)
        if name in signed or entry.get("algorithm") != "sha256":
            strict.refuse(source, "resources", f"{strict.quote(name)} stands there twice, or not with sha256")
        signed[name] = _take(entry, source, "digest", str)
    return signed


def _take(value: Any, source: str, key: str, kind: type = object) -> Any:
    if not isinstance(value, dict) or not isinstance(value.get(key), kind) or key not in value:
        strict.refuse(source, key, "missing, or of another type than a signature's")
    return value[key]


def _bytes(value: Any, source: str, key: str) -> bytes:
    try:
        return base64.b64decode(_take(value, source, key, str), validate=True)
    except (binascii.Error, ValueError) as error:
        strict.refuse(source, key, f"no base64: {error}")


def _is_file(status: os.stat_result) -> bool:
    return not stat.S_ISDIR(status.st_mode)


def _shown(path: str) -> str:
    return path if path.isascii() and path.isprintable() else ascii(path)
