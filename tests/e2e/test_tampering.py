"""Kinds of tampering with a signed artifact, each refused before a byte of native code is loaded.

`make tamper` prints the table: what was done, and what the loader said. The dynamic linker is watched: whatever would
be given to it is counted, and the untouched copy shows that the watch sees a load.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from ingot.artifacts.errors import IngotError, UsageError, VerificationError
from ingot.artifacts.fingerprint import digest_file
from ingot.artifacts.manifest import PROVENANCE, SBOM, SIGNATURE
from ingot.artifacts.signature import Bundle, make_payload, write_bundle
from ingot.artifacts.store import open_artifact
from ingot.runtime import LLM
from ingot.runtime.engines import aoti, aoti_host
from ingot.runtime.keys import sign

from ..conftest import Demo

ENGINE, OTHER, KERNELS = "engines/decode-b1.so", "engines/decode-b4.so", "engines/kernels.so"
WEIGHTS, MANIFEST = "weights/model.safetensors", "manifest.json"


class Loaded(Exception):
    """Native code was about to be loaded."""


@dataclass(frozen=True)
class Maker:
    """A signed artifact, the key that signed it, and another key."""

    root: Path
    public: Path
    stranger: Path  # a private key


@pytest.fixture(scope="module")
def maker(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> Maker:
    folder = tmp_path_factory.mktemp("maker")
    for name in ("maker", "stranger"):
        private = ec.generate_private_key(ec.SECP256R1())
        pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        (folder / f"{name}.pem").write_bytes(private.private_bytes(pem, pkcs8, serialization.NoEncryption()))
        public = private.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
        (folder / f"{name}.pub").write_bytes(public)
    root = demo.copy(folder / "artifact")
    sign_with(root, folder / "maker.pem")
    return Maker(root, folder / "maker.pub", folder / "stranger.pem")


@pytest.fixture(autouse=True)
def linker(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What would have been given to the dynamic linker, in place of doing so."""
    asked: list[str] = []

    def open_library(path: Path, name: str, *_: object) -> NoReturn:
        asked.append(name)
        raise Loaded(name)

    for module in (aoti, aoti_host):
        monkeypatch.setattr(module, "open_library", open_library)
    return asked


@pytest.fixture(scope="module")
def table() -> Iterator[list[tuple[str, str]]]:
    """(kind, what was said), printed at the end for `pytest -s`."""
    rows: list[tuple[str, str]] = []
    yield rows
    print(f"\n\n{len(rows)} kinds of tampering, {len(rows)} refused before native code\n")
    for number, (kind, said) in enumerate(rows, 1):
        print(f"{number:3}  {kind:52}  {said}")


def sign_with(root: Path, key: Path, change: Callable[[dict[str, Any]], object] = lambda statement: None) -> None:
    statement = json.loads(make_payload(root, "tiny"))
    change(statement)
    bundle = sign(json.dumps(statement).encode(), key, lambda: b"")
    (root / SIGNATURE).write_bytes(write_bundle(bundle))


def edit(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrite the manifest in its canonical form."""
    manifest = json.loads((root / MANIFEST).read_text())
    change(manifest)
    (root / MANIFEST).write_text(json.dumps(manifest, sort_keys=True, indent=1) + "\n")


def text(root: Path, change: Callable[[str], str]) -> None:
    (root / MANIFEST).write_text(change((root / MANIFEST).read_text()))


def flip(path: Path, position: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * position)] ^= 1
    path.write_bytes(content)


def vouch(root: Path, name: str) -> None:
    """Let the manifest list a file as it stands now."""
    entry = {"path": name, "size": (root / name).stat().st_size, "sha256": digest_file(root / name)}
    edit(root, lambda m: m.update(files=[entry if f["path"] == name else f for f in m["files"]]))


def exchange(first: Path, second: Path) -> None:
    aside = first.with_name("aside")
    first.rename(aside)
    second.rename(first)
    aside.rename(second)


def behind_link(path: Path) -> None:
    """Move something out of the artifact, and put a symbolic link in its place."""
    outside = next(p for p in path.parents if (p / MANIFEST).exists()).parent / f"{path.name}.away"
    path.rename(outside)
    path.symlink_to(outside)


def replace(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def listen(path: Path) -> None:
    """A socket; its name is short, so it is made where we stand."""
    server = socket.socket(socket.AF_UNIX)
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        server.bind(path.name)
    finally:
        os.chdir(here)
        server.close()


def first_file(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda root: edit(root, lambda m: change(m["files"][0]))


def replaced_and_vouched(name: str, change: Callable[[Path], object]) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        change(root / name)
        vouch(root, name)

    return apply


def bundle_edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        bundle = json.loads((root / SIGNATURE).read_text())
        change(bundle)
        (root / SIGNATURE).write_text(json.dumps(bundle))

    return apply


def statement_edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(bundle: dict[str, Any]) -> None:
        statement = json.loads(base64.b64decode(bundle["dsseEnvelope"]["payload"]))
        change(statement)
        bundle["dsseEnvelope"]["payload"] = base64.b64encode(json.dumps(statement).encode()).decode()

    return bundle_edit(apply)


def without_code(root: Path) -> None:
    """Another engine, and the signed manifest's entry for it taken out of the statement too."""
    flip(root / ENGINE)
    statement_edit(lambda s: s["predicate"]["resources"].pop(0))(root)


Tamper = Callable[[Path], object]
MANIFESTS: dict[str, Tamper] = {
    "manifest cut short": lambda r: text(r, lambda t: t[: len(t) // 2]),
    "manifest empty": lambda r: (r / MANIFEST).write_text(""),
    "manifest not UTF-8": lambda r: (r / MANIFEST).write_bytes(b"\xff" + (r / MANIFEST).read_bytes()),
    "manifest with a key twice": lambda r: text(r, lambda t: t.replace("{", '{"name": "x",', 1)),
    "manifest with NaN": lambda r: text(r, lambda t: t.replace('"schema_version": 2', '"schema_version": NaN')),
    "manifest nested without end": lambda r: (r / MANIFEST).write_text("[" * 100_000),
    "manifest of 17 MiB": lambda r: (r / MANIFEST).write_text(" " * (17 << 20)),
    "manifest with an unknown field": lambda r: edit(r, lambda m: m.update(more=1)),
    "manifest without a field": lambda r: edit(r, lambda m: m.pop("engines")),
    "manifest with true for a number": lambda r: edit(r, lambda m: m["engines"][0].update(batch=True)),
    "manifest of a newer schema": lambda r: edit(r, lambda m: m.update(schema_version=99)),
    "manifest of an older schema": lambda r: edit(r, lambda m: m.update(schema_version=1)),
    "manifest missing": lambda r: (r / MANIFEST).unlink(),
    "manifest a symbolic link": lambda r: behind_link(r / MANIFEST),
    "manifest a FIFO": lambda r: replace(r / MANIFEST, os.mkfifo),
    "manifest a folder": lambda r: replace(r / MANIFEST, os.mkdir),
    "manifest written with other spaces": lambda r: text(r, lambda t: json.dumps(json.loads(t))),
    "manifest claims another gate result": lambda r: edit(r, lambda m: m.update(gate={"passed": True})),
    "manifest names another model": lambda r: edit(r, lambda m: m["model"].update(architecture="Other")),
    "manifest asks less of the processor": lambda r: edit(r, lambda m: m["target"].update(isa=[])),
    "manifest lists a file no more": lambda r: edit(r, lambda m: m["files"].pop()),
}
PATHS: dict[str, Tamper] = {
    "listed path absolute": first_file(lambda f: f.update(path="/etc/passwd")),
    "listed path with ..": first_file(lambda f: f.update(path="../outside.so")),
    "listed path with a backslash": first_file(lambda f: f.update(path="engines\\x.so")),
    "listed path of a hidden file": first_file(lambda f: f.update(path=".hidden")),
    "listed path with a look-alike letter": first_file(lambda f: f.update(path="engin\u0435s/x.so")),
    "listed path that differs in case alone": lambda r: edit(
        r, lambda m: m["files"].append({**m["files"][0], "path": m["files"][0]["path"].upper()})
    ),
    "listed path below a file": lambda r: edit(
        r, lambda m: m["files"].append({**m["files"][0], "path": m["files"][0]["path"] + "/x"})
    ),
    "engine that is not among the files": lambda r: edit(r, lambda m: m["engines"][0].update(file="engines/no.so")),
}
FILES: dict[str, Tamper] = {
    "engine: one bit flipped": lambda r: flip(r / ENGINE),
    "engine: its last byte flipped": lambda r: flip(r / ENGINE, 0.9999999),
    "engine cut short": lambda r: os.truncate(r / ENGINE, 4096),
    "engine with bytes behind it": lambda r: (r / ENGINE).write_bytes((r / ENGINE).read_bytes() + b"\0"),
    "engine empty": lambda r: os.truncate(r / ENGINE, 0),
    "engine missing": lambda r: (r / ENGINE).unlink(),
    "engine a symbolic link": lambda r: behind_link(r / ENGINE),
    "engine with a second hard link": lambda r: os.link(r / ENGINE, r.parent / "second"),
    "engine a FIFO": lambda r: replace(r / ENGINE, os.mkfifo),
    "engine a folder": lambda r: replace(r / ENGINE, os.mkdir),
    "engine a socket": lambda r: replace(r / ENGINE, listen),
    "engines exchanged": lambda r: exchange(r / ENGINE, r / OTHER),
    "engine renamed in case": lambda r: (r / ENGINE).rename(r / "engines/DECODE-B1.so"),
    "kernels: one bit flipped": lambda r: flip(r / KERNELS),
    "kernels exchanged for an engine": lambda r: shutil.copyfile(r / ENGINE, r / KERNELS),
    "weights cut short": lambda r: os.truncate(r / WEIGHTS, (r / WEIGHTS).stat().st_size // 2),
    "weights: one bit flipped": lambda r: flip(r / WEIGHTS),
    "weights: header changed": lambda r: flip(r / WEIGHTS, 0.0001),
    "weights missing": lambda r: (r / WEIGHTS).unlink(),
    "weights a symbolic link": lambda r: behind_link(r / WEIGHTS),
    "tokenizer changed": lambda r: flip(r / "tokenizer.json"),
    "chat template changed": lambda r: flip(r / "chat_template.jinja"),
    "sampling defaults changed": lambda r: flip(r / "generation.json"),
    "report of the gate changed": lambda r: flip(r / "report/gate.json"),
    "engines' folder a symbolic link": lambda r: behind_link(r / "engines"),
    "weights' folder a symbolic link": lambda r: behind_link(r / "weights"),
    "engines' folder a file": lambda r: (shutil.rmtree(r / "engines"), (r / "engines").touch()),
    "extra library": lambda r: shutil.copyfile(r / ENGINE, r / "engines/more.so"),
    "extra hidden file": lambda r: (r / ".preload").write_text("x"),
    "extra empty folder": lambda r: (r / "plugins").mkdir(),
    "extra folder that differs in case": lambda r: shutil.copytree(r / "engines", r / "Engines"),
    "extra symbolic link": lambda r: (r / "engines/link").symlink_to("/etc/passwd"),
    "extra FIFO": lambda r: os.mkfifo(r / "report/pipe"),
    "extra git folder": lambda r: ((r / ".git").mkdir(), (r / ".git/config").write_text("[core]")),
    "extra name that would steer a terminal": lambda r: (r / "engines/\x1b[2J").touch(),
}
VOUCHED: dict[str, Tamper] = {
    "engine changed, manifest made to fit": replaced_and_vouched(ENGINE, flip),
    "kernels changed, manifest made to fit": replaced_and_vouched(KERNELS, flip),
    "weights changed, manifest made to fit": replaced_and_vouched(WEIGHTS, flip),
    "tokenizer changed, manifest made to fit": replaced_and_vouched("tokenizer.json", flip),
    "engines exchanged by the manifest": lambda r: edit(
        r, lambda m: m["engines"][0].update(file=m["engines"][1]["file"])
    ),
    "weights of two constants exchanged": lambda r: edit(
        r, lambda m: m["engines"][0]["constants"][0].update(weight=m["engines"][0]["constants"][1]["weight"])
    ),
    "library added, manifest made to fit": lambda r: (
        shutil.copyfile(r / KERNELS, r / "engines/more.so"),
        edit(r, lambda m: m["files"].append({"path": "engines/more.so", "size": 0, "sha256": "0" * 64})),
        vouch(r, "engines/more.so"),
    ),
}
SIGNATURES: dict[str, Tamper] = {
    "signature missing": lambda r: (r / SIGNATURE).unlink(),
    "signature empty": lambda r: os.truncate(r / SIGNATURE, 0),
    "signature a symbolic link": lambda r: behind_link(r / SIGNATURE),
    "signature a FIFO": lambda r: replace(r / SIGNATURE, os.mkfifo),
    "signature of zeros": bundle_edit(
        lambda b: b["dsseEnvelope"]["signatures"][0].update(sig=base64.b64encode(bytes(70)).decode())
    ),
    "signature without signatures": bundle_edit(lambda b: b["dsseEnvelope"].update(signatures=[])),
    "signed statement changed": statement_edit(lambda s: s["subject"][0].update(name="other")),
    "signed statement names less, engine changed": without_code,
    "provenance changed": lambda r: flip(r / PROVENANCE),
    "provenance missing": lambda r: (r / PROVENANCE).unlink(),
    "bill of materials changed": lambda r: flip(r / SBOM),
}
TAMPERS = {**MANIFESTS, **PATHS, **FILES, **VOUCHED, **SIGNATURES}


def refused(root: Path, trust: str, linker: list[str], table: list[tuple[str, str]], kind: str) -> IngotError:
    """The refusal of a load, noted in the table."""
    with pytest.raises((VerificationError, UsageError)) as caught:
        LLM(root, trust=trust)
    assert linker == [], "native code was reached"
    said = f"{caught.value.what} ({caught.value.why})".replace(f"{root}/", "").replace(str(root), "artifact")
    table.append((kind, ascii(said)[1:-1][:120]))
    return caught.value


def test_the_untouched_copy_reaches_the_linker(maker: Maker, linker: list[str]) -> None:
    with pytest.raises(Loaded):
        LLM(maker.root, trust=f"signed:{maker.public}")
    assert linker == [KERNELS]


@pytest.mark.parametrize("kind", TAMPERS)
def test_tampering_is_refused(
    maker: Maker, linker: list[str], table: list[tuple[str, str]], tmp_path: Path, kind: str
) -> None:
    root = Path(shutil.copytree(maker.root, tmp_path / "artifact"))
    TAMPERS[kind](root)
    error = refused(root, f"signed:{maker.public}", linker, table, kind)
    assert error.fix


def test_a_signature_of_another_artifact_is_refused(
    maker: Maker, linker: list[str], table: list[tuple[str, str]], tmp_path: Path
) -> None:
    root = Path(shutil.copytree(maker.root, tmp_path / "artifact"))
    edit(root, lambda m: m.update(name="other"))
    assert "not what was signed" in str(
        refused(root, f"signed:{maker.public}", linker, table, "signature of another artifact")
    )


def test_a_signature_by_another_key_is_refused(
    maker: Maker, linker: list[str], table: list[tuple[str, str]], tmp_path: Path
) -> None:
    root = Path(shutil.copytree(maker.root, tmp_path / "artifact"))
    flip(root / ENGINE)
    vouch(root, ENGINE)
    sign_with(root, maker.stranger)
    assert open_artifact(root)
    kind = "engine changed, signed again by another key"
    assert "another key" in str(refused(root, f"signed:{maker.public}", linker, table, kind))


def test_another_digest_than_the_one_named_is_refused(
    maker: Maker, linker: list[str], table: list[tuple[str, str]], tmp_path: Path
) -> None:
    root = Path(shutil.copytree(maker.root, tmp_path / "artifact"))
    digest = open_artifact(root).manifest.digest()
    flip(root / ENGINE)
    vouch(root, ENGINE)
    sign_with(root, maker.stranger)
    kind = "engine changed, its digest is not the one named"
    assert digest not in str(refused(root, f"digest:sha256:{digest}", linker, table, kind))


def test_native_code_of_unknown_origin_is_refused_with_the_ways_out(
    maker: Maker, linker: list[str], table: list[tuple[str, str]], tmp_path: Path
) -> None:
    root = Path(shutil.copytree(maker.root, tmp_path / "artifact"))
    edit(root, lambda m: m.update(name="other"))
    with pytest.raises(VerificationError) as caught:
        LLM(root)
    assert linker == []
    for way in ("ingot build", "signed:", "digest:sha256:"):
        assert way in caught.value.fix
    table.append(("no policy given, built elsewhere", caught.value.why[:120]))


def test_there_are_more_than_fifty() -> None:
    assert len(TAMPERS) >= 75


def test_what_was_signed_and_named_is_accepted(maker: Maker, tmp_path: Path) -> None:
    digest = open_artifact(maker.root).manifest.digest()
    for trust in (f"digest:sha256:{digest}", "local", ["signed", f"signed:{maker.public}"]):
        with pytest.raises(Loaded):
            LLM(maker.root, trust=trust)


def test_a_bundle_is_written_as_it_was_read(maker: Maker) -> None:
    from ingot.artifacts.signature import read_bundle

    bundle = read_bundle(maker.root)
    assert isinstance(bundle, Bundle)
    assert write_bundle(bundle) == (maker.root / SIGNATURE).read_bytes()
