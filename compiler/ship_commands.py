"""`ingot push` and `ingot pull`: artifacts to and from registries, OCI layout folders and plain folders.

Neither imports torch or executes anything of the artifact.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..artifacts.errors import VerificationError
from ..artifacts.oci.reference import Reference
from ..artifacts.oci.transfer import pull as pull_artifact
from ..artifacts.oci.transfer import push as push_artifact
from ..artifacts.store import OpenArtifact, open_artifact
from .console import Progress, open_progress, size_text


def push(args: argparse.Namespace) -> int:
    """Send an artifact; prints the image's digest, which pins it for good."""
    reference = Reference.parse(args.reference)
    with open_progress(args.json) as progress, progress.stage(f"push to {reference}"):
        image = push_artifact(args.artifact, reference, _Counter(progress), args.plain_http)
    size = sum(layer.size for layer in image.layers)
    digest = open_artifact(args.artifact, "sizes").manifest.digest()
    facts = {"reference": str(reference), "image": image.digest, "digest": digest, "bytes": size}
    if args.json:
        print(json.dumps(facts | {"files": len(image.layers)}))
    else:
        print(f"pushed {len(image.layers)} files, {size_text(size)}, to {reference}")
        print(f"image  {image.digest}\ndigest sha256:{digest}")
    return 0


def pull(args: argparse.Namespace) -> int:
    """Fetch an artifact into a folder; with --key only if it is signed by that key."""
    reference = Reference.parse(args.reference)
    output = args.output if args.output is not None else Path("artifacts/built") / _name(reference)

    def accept(artifact: OpenArtifact) -> None:
        if not args.key:
            return
        from ..runtime.keys import check_signature

        _, findings = check_signature(artifact, args.key)
        if findings:
            why, fix = "; ".join(map(str, findings)), findings[0].fix
            raise VerificationError(f"{reference} is not signed as it should be, and is not put in place", why, fix)

    with open_progress(args.json) as progress, progress.stage(f"pull {reference}"):
        image, manifest = pull_artifact(
            reference, output, _Counter(progress), force=args.force, plain_http=args.plain_http, accept=accept
        )
    size = sum(layer.size for layer in image.layers)
    facts = {"path": str(output), "image": image.digest, "digest": manifest.digest(), "bytes": size}
    if args.json:
        print(json.dumps(facts | {"files": len(image.layers)}))
    else:
        print(f"pulled {len(image.layers)} files, {size_text(size)}, to {output}")
        print(f"image  {image.digest}\ndigest sha256:{manifest.digest()}")
        key = f"signed:{args.key[0]}" if args.key else f"digest:sha256:{manifest.digest()}"
        print(f'try: ingot run {output} "…" --trust {key}')
    return 0


class _Counter:
    """Tells the progress which file is at hand, once per file."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def __call__(self, path: str, count: int) -> None:
        self._progress.update(path)


def _name(reference: Reference) -> str:
    """What a pulled artifact is called by default."""
    if reference.folder is not None or reference.layout is not None:
        return Path(reference.folder or reference.layout or "artifact").name
    return reference.name.rpartition("/")[2]
