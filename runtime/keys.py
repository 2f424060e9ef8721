"""Signing and verifying with elliptic-curve keys, by `cryptography` (the extra `ingot[sign]`), imported when asked.

Curves and hashes are model-signing's: P-256 with SHA-256, P-384 with SHA-384, P-521 with SHA-512. Keys are PEM files,
public ones of at most a few kB; nothing of an artifact is executed or imported here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..artifacts.errors import ResourceError, UsageError, VerificationError
from ..artifacts.files import read_small
from ..artifacts.folder import Finding
from ..artifacts.manifest import SIGNATURE
from ..artifacts.signature import Bundle, compare_signed, pae, read_bundle
from ..artifacts.store import OpenArtifact

_MAX_KEY_BYTES = 64 << 10
_MAKE = "make one with `openssl ecparam -name prime256v1 -genkey -noout -out key.pem`"


def sign(payload: bytes, key: Path, password: Callable[[], bytes]) -> Bundle:
    """Sign a statement with the private key in a PEM file; `password` is asked only if the key is encrypted.

    Raises:
        UsageError: no such file, no private key of a known curve, or a wrong password.
        ResourceError: `cryptography` is not installed.
    """
    ec, serialization = _library()
    content = _read(key)
    try:
        private = serialization.load_pem_private_key(content, None)
    except TypeError:  # it is encrypted
        try:
            private = serialization.load_pem_private_key(content, password())
        except ValueError as error:
            raise UsageError(f"cannot open the key {key}", "the password is wrong", "try again") from error
    except ValueError as error:
        raise UsageError(f"{key} is no private key", "it is not a private key in PEM", _MAKE) from error
    public = private.public_key()
    signature = private.sign(pae(payload), ec.ECDSA(_hash_of(public, key)))
    return Bundle(payload, signature, _key_id(public, serialization))


def key_id(key: Path) -> str:
    """sha256 of a public key in PEM: the name a signature gives its key by. Errors: see `verified_by`."""
    return _key_id(_load_public(key), _library()[1])


def verified_by(bundle: Bundle, keys: Iterable[Path]) -> Path | None:
    """The first of these public keys that made the signature, None if none did.

    Raises:
        UsageError: a key file is missing or holds no public key of a known curve.
        ResourceError: `cryptography` is not installed.
    """
    ec, _ = _library()
    from cryptography.exceptions import InvalidSignature

    for path in keys:
        public = _load_public(path)
        try:
            public.verify(bundle.signature, pae(bundle.payload), ec.ECDSA(_hash_of(public, path)))
        except InvalidSignature:
            continue
        return path
    return None


def check_signature(artifact: OpenArtifact, keys: Iterable[Path]) -> tuple[Path | None, list[Finding]]:
    """Which of these keys signed an artifact, and everything in its folder that is not as it was signed.

    The digests of the files that the manifest lists are left to the caller, as in `compare_signed`.

    Raises:
        UsageError, ResourceError: as `verified_by`.
    """
    try:
        bundle = read_bundle(artifact.root)
        signer = verified_by(bundle, keys)
        if signer is None:
            made = f"key {bundle.key_id[:16]}…" if bundle.key_id else "an unnamed key"
            why = f"signed by another key ({made}), or changed since"
            return None, [Finding(SIGNATURE, why, "ask its maker for the public key, and compare it by another way")]
        return signer, compare_signed(artifact.root, artifact.manifest, bundle.payload)
    except VerificationError as error:
        missing = not (artifact.root / SIGNATURE).exists()
        what = "not signed: there is no model.sig" if missing else error.why or error.what
        return None, [Finding(SIGNATURE, what, "sign it with `ingot sign`, or fetch a signed copy")]


def _library() -> tuple[Any, Any]:
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError as error:
        why = "cryptography is not installed"
        raise ResourceError("signatures cannot be made or verified", why, 'pip install "ingot[sign]"') from error
    return ec, serialization


def _load_public(path: Path) -> Any:
    from cryptography.exceptions import UnsupportedAlgorithm

    _, serialization = _library()
    try:
        return serialization.load_pem_public_key(_read(path))
    except (ValueError, UnsupportedAlgorithm) as error:
        fix = "make it from the private key with `openssl ec -in key.pem -pubout -out key.pub`"
        raise UsageError(f"{path} is no public key", "it is not a public key in PEM", fix) from error


def _read(path: Path) -> bytes:
    try:
        # Resolved: a key may be mounted through a link, as Kubernetes does it.
        return read_small(path.resolve(), _MAX_KEY_BYTES)
    except VerificationError as error:
        raise UsageError(f"cannot read the key {path}", error.why or error.what, "check the path") from error


def _hash_of(public: Any, path: Path) -> Any:
    from cryptography.hazmat.primitives import hashes

    curves: dict[str, Any] = {"secp256r1": hashes.SHA256, "secp384r1": hashes.SHA384, "secp521r1": hashes.SHA512}
    name = getattr(getattr(public, "curve", None), "name", "")
    if name not in curves:
        raise UsageError(f"the key {path} is of another kind", "it is not on the curve P-256, P-384 or P-521", _MAKE)
    return curves[name]()


def _key_id(public: Any, serialization: Any) -> str:
    encoding, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(public.public_bytes(encoding, form)).hexdigest()
