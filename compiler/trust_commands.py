"""`ingot sign` and `ingot verify`: who vouches for an artifact, and whether it is what they vouched for.

Neither imports torch or executes anything of the artifact; a test holds them to it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from getpass import getpass
from pathlib import Path

from ..artifacts.errors import UsageError, VerificationError
from ..artifacts.files import replace_file
from ..artifacts.folder import Finding
from ..artifacts.manifest import SIGNATURE
from ..artifacts.signature import make_payload, write_bundle
from ..artifacts.store import OpenArtifact, check, open_artifact
from .console import printable, size_text


def sign(args: argparse.Namespace) -> int:
    """Sign the whole folder of an artifact that is intact; its signature, if there is one, is replaced."""
    from ..runtime.keys import sign as sign_payload

    artifact = open_artifact(args.artifact)
    payload = make_payload(artifact.root, artifact.manifest.name)
    bundle = sign_payload(payload, args.key, lambda: _ask_password(args.key))
    replace_file(artifact.root / SIGNATURE, write_bundle(bundle))
    files = len(json.loads(payload)["predicate"]["resources"])
    facts = {
        "path": str(args.artifact), "digest": artifact.manifest.digest(), "files": files, "key": bundle.key_id,
        "signature": str(artifact.root / SIGNATURE),
    }  # fmt: skip
    if args.json:
        print(json.dumps(facts))
    else:
        print(f"{args.artifact}: signed {files} files with key {bundle.key_id[:16]}…")
        print(f"digest sha256:{facts['digest']}; verify with: ingot verify {args.artifact} --key PUBLIC_KEY")
    return 0


def verify(args: argparse.Namespace) -> int:
    """Check schema, files, digests, target and, with --key, the signature; 0, or the exit code 4 and all findings."""
    findings = check(args.artifact)
    signer: Path | None = None
    if args.key:
        signer, more = _signature(args.artifact, args.key)
        findings = [*findings, *(finding for finding in more if finding not in findings)]
    if args.json:
        facts = [dataclasses.asdict(finding) for finding in findings]
        signed_by = str(signer) if signer is not None else None
        print(json.dumps({"path": str(args.artifact), "ok": not findings, "signed_by": signed_by, "findings": facts}))
    elif findings:
        print(f"error: {args.artifact} failed verification: {len(findings)} findings", file=sys.stderr)
        for finding in findings:
            print(f"  {printable(str(finding))}\n    fix: {printable(finding.fix)}", file=sys.stderr)
    else:
        manifest = open_artifact(args.artifact, verify="sizes").manifest
        total = size_text(sum(entry.size for entry in manifest.files))
        if signer is not None:
            who = f"signed by {signer}"
        else:
            who = "signed, by whom is not checked without --key" if _is_signed(args.artifact) else "not signed"
        print(f"{args.artifact}: ok, {len(manifest.files)} files, {total}, fits this machine, {who}")
    return VerificationError.exit_code if findings else 0


def _signature(path: Path, keys: list[Path]) -> tuple[Path | None, list[Finding]]:
    """Who signed, and what is not as it was signed. A folder without a valid manifest has its findings already."""
    from ..artifacts.manifest import load_manifest
    from ..runtime.keys import check_signature

    try:
        artifact = OpenArtifact(path.resolve(), load_manifest(path))
    except VerificationError:
        return None, [Finding(SIGNATURE, "not checked: there is no valid manifest", "fetch an intact copy")]
    return check_signature(artifact, keys)


def _is_signed(path: Path) -> bool:
    return (path / SIGNATURE).exists()


def _ask_password(key: Path) -> bytes:
    if not sys.stdin.isatty():
        why = "it is encrypted, and there is no terminal to ask for its password"
        raise UsageError(f"cannot open the key {key}", why, "use a key without a password here, or a terminal")
    return getpass(f"password of {key}: ").encode()
