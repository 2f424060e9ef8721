"""Asked between opening an artifact and loading anything of it: is this code of somebody whom the user trusts?"""

from __future__ import annotations

from ..artifacts.errors import VerificationError
from ..artifacts.manifest import SIGNATURE
from ..artifacts.store import OpenArtifact
from ..artifacts.trust import Trust, key_folder, was_built_here


def require_trust(artifact: OpenArtifact, trust: Trust) -> str:
    """Refuse an artifact that the policy does not accept; nothing of it has been executed by then.

    The default policy asks only where an artifact brings code for this host's processor: a kernel plan runs on the GPU
    alone, and every argument of it is checked before. A policy that the user chose is asked of every artifact.

    Returns:
        Why it is accepted, in words.

    Raises:
        VerificationError: it is not; names the ways out.
        UsageError: a key that the policy names cannot be read.
    """
    manifest = artifact.manifest
    if not trust.explicit and all(engine.kind == "plan" for engine in manifest.engines):
        return "it holds no code for the host"
    reasons = []
    digest = manifest.digest()
    if digest in trust.digests:
        return "its digest is the one that was named"
    if trust.digests:
        reasons.append(f"its digest is sha256:{digest}, which was not named")
    if trust.local:
        if not (why := was_built_here(digest)):
            return "it was built on this host"
        reasons.append(why)
    if trust.configured or trust.keys:
        why = _why_not_signed(artifact, trust)
        if not why:
            return "it is signed by a trusted key"
        reasons.append(why)
    raise VerificationError(
        f"the artifact {artifact.root} is of unknown origin, so none of its code is run",
        "; ".join(reasons),
        "one of three: build it on this host (`ingot build`); give the public key of whoever signed it"
        f" (`--trust signed:KEY.pub`, or put the key into {key_folder()}); or compare its digest with what its maker"
        f" says and name it (`--trust digest:sha256:{digest}`)",
    )


def _why_not_signed(artifact: OpenArtifact, trust: Trust) -> str:
    """Why an artifact does not count as signed; empty if it does."""
    if not (artifact.root / SIGNATURE).exists():
        return "it is not signed"
    keys = trust.public_keys()
    if not keys:
        return f"it is signed, but no public key to verify it with is in {key_folder()}"
    from .keys import check_signature

    signer, findings = check_signature(artifact, keys)
    return "" if signer is not None and not findings else "; ".join(map(str, findings))
