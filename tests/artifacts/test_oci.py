"""Artifacts in registries and layout folders: there and back, resumed, pinned, and against a hostile registry."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ingot.artifacts.errors import IngotError, ResourceError, UsageError, VerificationError
from ingot.artifacts.manifest import load_manifest
from ingot.artifacts.oci import http, registry, transfer
from ingot.artifacts.oci.image import (
    ARTIFACT_TYPE,
    CODE_TYPE,
    CONFIG_TYPE,
    DOC_TYPE,
    PATH_KEY,
    SETTING_TYPE,
    WEIGHT_TYPE,
    digest_of,
    make_image,
    read_image,
)  # fmt: skip
from ingot.artifacts.oci.reference import Reference
from ingot.artifacts.oci.transfer import pull, push
from ingot.artifacts.store import OpenArtifact, open_artifact

from .conftest import Maker
from .registry_double import Double, serve


def quiet(path: str, count: int) -> None:
    pass


@pytest.fixture()
def double(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Double]:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(registry, "CHUNK_BYTES", 16)
    monkeypatch.setattr(registry, "PIECE_BYTES", 7)
    with serve() as double:
        yield double


@pytest.fixture()
def no_leftovers() -> None:
    """In place of the one that counts descriptors: server threads have some of their own."""


def at(double: Double, tail: str = "team/demo:v1") -> Reference:
    return Reference.parse(f"{double.host}/{tail}")


def tree(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


# --- references ------------------------------------------------------------------------------------------------------

PIN = "sha256:" + "ab" * 32


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ghcr.io/org/demo:v1", Reference("ghcr.io", "org/demo", "v1")),
        ("localhost:5000/a/b/c_d", Reference("localhost:5000", "a/b/c_d", "latest")),
        (f"ghcr.io/demo@{PIN}", Reference("ghcr.io", "demo", "", PIN)),
        (f"[::1]:80/demo:v1@{PIN}", Reference("[::1]:80", "demo", "v1", PIN)),
        ("oci:some/folder:v1", Reference(tag="v1", layout=Path("some/folder"))),
        (f"oci:/a/b@{PIN}", Reference(digest=PIN, layout=Path("/a/b"))),
        ("oci:x", Reference(tag="latest", layout=Path("x"))),
        ("dir:/a/b", Reference(folder=Path("/a/b"))),
    ],
)
def test_references(text: str, expected: Reference) -> None:
    assert Reference.parse(text) == expected


@pytest.mark.parametrize(
    "text", ["", "demo", "demo:v1", "org/demo", "HTTP://x.y/z", "x.y/Demo", "x.y/a//b", "x.y/../b", "x.y/a:",
             "x.y/a:b:c", "x.y/a@sha256:00", "x.y/a@md5:00", "x.y:port/a", "a b.c/d",
             "x.y/a\n", "oci:", "dir:", f"x.y/{'a' * 300}"],
)  # fmt: skip
def test_what_is_no_reference_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="cannot push"):
        Reference.parse(text)


def test_only_this_machine_is_asked_without_tls() -> None:
    assert http.Http(Reference.parse("localhost:5000/a"), False, None).base == "http://localhost:5000/v2/a/"
    assert http.Http(Reference.parse("127.0.0.1.evil.com/a"), False, None).base.startswith("https://")
    assert http.Http(Reference.parse("example.com/a"), True, None).base.startswith("http://")


# --- there and back --------------------------------------------------------------------------------------------------


def test_an_artifact_comes_back_as_it_went(double: Double, artifact: Path, tmp_path: Path) -> None:
    image = push(artifact, at(double), quiet)
    again, manifest = pull(at(double), tmp_path / "back", quiet)
    assert tree(tmp_path / "back") == tree(artifact)
    assert (again.digest, manifest) == (image.digest, load_manifest(artifact))
    assert not list(tmp_path.glob(".*"))


def test_the_image_is_a_modelpack_artifact(double: Double, artifact: Path) -> None:
    push(artifact, at(double), quiet)
    value = json.loads(double.manifests["v1"])
    assert (value["artifactType"], value["config"]["mediaType"]) == (ARTIFACT_TYPE, CONFIG_TYPE)
    kinds = {layer["annotations"][PATH_KEY]: layer["mediaType"] for layer in value["layers"]}
    assert kinds["manifest.json"] == kinds["tokenizer.json"] == SETTING_TYPE
    assert kinds["weights/model.safetensors"] == WEIGHT_TYPE
    assert kinds["engines/decode-b1.so"] == CODE_TYPE
    assert kinds["report/gate.json"] == DOC_TYPE
    for layer in value["layers"]:
        content = (artifact / layer["annotations"][PATH_KEY]).read_bytes()
        assert (layer["digest"], layer["size"]) == (digest_of(content), len(content))
    config = json.loads(double.blobs[value["config"]["digest"]])
    assert config["modelfs"]["diffIds"] == [layer["digest"] for layer in value["layers"]]
    assert config["config"]["format"] == "ingot"


def test_the_same_artifact_gives_the_same_image(artifact: Path, tmp_path: Path) -> None:
    opened = open_artifact(artifact)
    first = make_image(opened.root, opened.manifest)[0]
    pull(Reference(folder=artifact), tmp_path / "elsewhere", quiet)
    second = make_image(tmp_path / "elsewhere", opened.manifest)[0]
    assert first == second


def test_what_a_registry_has_is_not_sent_again(double: Double, artifact: Path) -> None:
    push(artifact, at(double), quiet)
    sent = len(double.requests)
    push(artifact, at(double, "team/demo:v2"), quiet)
    methods = [method for method, _ in double.requests[sent:]]
    assert set(methods) == {"HEAD", "PUT"} and methods.count("PUT") == 1


def test_layout_folders_and_plain_copies(artifact: Path, tmp_path: Path) -> None:
    layout = f"oci:{tmp_path / 'layout'}"
    image = push(artifact, Reference.parse(f"{layout}:v1"), quiet)
    push(artifact, Reference.parse(f"{layout}:v2"), quiet)
    assert json.loads((tmp_path / "layout/oci-layout").read_text()) == {"imageLayoutVersion": "1.0.0"}
    index = json.loads((tmp_path / "layout/index.json").read_text())
    assert [entry["digest"] for entry in index["manifests"]] == [image.digest] * 2
    for path in (tmp_path / "layout/blobs/sha256").iterdir():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name
    for number, text in enumerate((f"{layout}:v2", f"{layout}@{image.digest}", f"dir:{artifact}")):
        pull(Reference.parse(text), tmp_path / f"back{number}", quiet)
        assert tree(tmp_path / f"back{number}") == tree(artifact)
    push(artifact, Reference.parse(f"dir:{tmp_path / 'copy'}"), quiet)
    assert tree(tmp_path / "copy") == tree(artifact)
    with pytest.raises(UsageError, match="v3"):
        pull(Reference.parse(f"{layout}:v3"), tmp_path / "none", quiet)


def test_a_blob_that_was_changed_in_a_layout_is_refused(artifact: Path, tmp_path: Path) -> None:
    push(artifact, Reference.parse(f"oci:{tmp_path / 'layout'}"), quiet)
    blob = digest_of((artifact / "engines/decode-b1.so").read_bytes()).removeprefix("sha256:")
    (tmp_path / "layout/blobs/sha256" / blob).write_bytes(b"x" * (artifact / "engines/decode-b1.so").stat().st_size)
    with pytest.raises(VerificationError, match=r"decode-b1\.so"):
        pull(Reference.parse(f"oci:{tmp_path / 'layout'}"), tmp_path / "back", quiet)
    assert not (tmp_path / "back").exists()


# --- pinning ---------------------------------------------------------------------------------------------------------


def test_a_tag_cannot_change_what_a_digest_pinned(double: Double, artifact: Path, maker: Maker, tmp_path: Path) -> None:
    image = push(artifact, at(double), quiet)
    maker.write(tmp_path / "evil", "second")
    other = push(tmp_path / "evil", at(double), quiet)
    pull(at(double, f"team/demo:v1@{image.digest}"), tmp_path / "pinned", quiet)
    assert tree(tmp_path / "pinned") == tree(artifact)
    pull(at(double), tmp_path / "tagged", quiet)
    assert tree(tmp_path / "tagged") == tree(tmp_path / "evil")
    # A registry that answers a digest with something else is found out.
    double.manifests[image.digest] = double.manifests[other.digest]
    with pytest.raises(VerificationError, match="not what it pins"):
        pull(at(double, f"team/demo@{image.digest}"), tmp_path / "lied", quiet)
    with pytest.raises(UsageError, match="not what"):
        push(tmp_path / "evil", at(double, f"team/demo:v1@{image.digest}"), quiet)


# --- resuming --------------------------------------------------------------------------------------------------------


def breaking_off(after: int, match: str = "") -> Callable[[Any], bool]:
    """Cuts every answer with a blob short, after so many bytes."""

    def spoil(handler: Any) -> bool:
        digest = handler.path.rpartition("/")[2]
        content = handler.double.blobs.get(digest, b"")
        if handler.command != "GET" or len(content) <= after or match not in handler.path:
            return False
        start = int(handler.headers.get("Range", "bytes=0-")[6:-1])
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        handler.send_header("Content-Length", str(len(content) - start))
        handler.end_headers()
        handler.wfile.write(content[start : start + after])
        handler.close_connection = True
        return True

    return spoil


def test_a_connection_that_keeps_breaking_still_gets_on(double: Double, artifact: Path, tmp_path: Path) -> None:
    push(artifact, at(double), quiet)
    double.spoil = breaking_off(9)
    pull(at(double), tmp_path / "back", quiet)
    assert tree(tmp_path / "back") == tree(artifact)


def test_an_interrupted_pull_asks_for_the_rest(double: Double, artifact: Path, tmp_path: Path) -> None:
    push(artifact, at(double), quiet)
    seen: dict[str, int] = {}

    def interrupt(path: str, count: int) -> None:
        seen[path] = seen.get(path, 0) + count
        if path.endswith(".safetensors") and seen[path] >= 14:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pull(at(double), tmp_path / "back", interrupt)
    assert not (tmp_path / "back").exists()
    part = tmp_path / ".back.ingot-pull/new/weights/model.safetensors"
    assert part.read_bytes() == (artifact / "weights/model.safetensors").read_bytes()[:14]
    before = len(double.headers)
    pull(at(double), tmp_path / "back", quiet)
    ranges = [headers.get("Range") for headers in double.headers[before:]]
    assert "bytes=14-" in ranges
    done = [path for path in seen if not path.endswith(".safetensors")]
    assert done and len(double.headers) - before == 1 + len(tree(artifact)) - len(done)
    assert tree(tmp_path / "back") == tree(artifact)


def test_a_registry_without_ranges_begins_again(double: Double, artifact: Path, tmp_path: Path) -> None:
    push(artifact, at(double), quiet)
    part = tmp_path / ".back.ingot-pull/new/tokenizer.json"
    part.parent.mkdir(parents=True)
    (tmp_path / ".back.ingot-pull").chmod(0o700)
    part.write_bytes((artifact / "tokenizer.json").read_bytes()[:5])

    def spoil(handler: Any) -> bool:
        handler.headers.replace_header("Range", "x") if "Range" in handler.headers else None
        return False

    double.spoil = spoil
    pull(at(double), tmp_path / "back", quiet)
    assert tree(tmp_path / "back") == tree(artifact)


def test_parts_of_something_else_are_found_out_and_removed(double: Double, artifact: Path, tmp_path: Path) -> None:
    push(artifact, at(double), quiet)
    new = tmp_path / ".back.ingot-pull/new"
    (new / "other").mkdir(parents=True)
    (tmp_path / ".back.ingot-pull").chmod(0o700)
    (new / "other/file").touch()
    (new / "tokenizer.json").write_bytes(b"not the beginning")
    (tmp_path / "outside").write_text("mine")
    (new / "generation.json").symlink_to(tmp_path / "outside")
    (new / "manifest.json").write_bytes(b"x" * (artifact / "manifest.json").stat().st_size)
    with pytest.raises(VerificationError, match=r"tokenizer\.json"):  # its beginning was wrong: noticed at its end
        pull(at(double), tmp_path / "back", quiet)
    pull(at(double), tmp_path / "back", quiet)
    assert tree(tmp_path / "back") == tree(artifact)
    assert (tmp_path / "outside").read_text() == "mine"


@pytest.mark.parametrize("prepare", ["symlink", "open to all", "file"])
def test_a_gathering_folder_of_somebody_else_is_not_used(artifact: Path, tmp_path: Path, prepare: str) -> None:
    work = tmp_path / ".back.ingot-pull"
    if prepare == "symlink":
        (tmp_path / "theirs").mkdir()
        work.symlink_to(tmp_path / "theirs")
    elif prepare == "file":
        work.touch()
    else:
        work.mkdir()
        work.chmod(0o777)
    with pytest.raises(UsageError, match="cannot gather"):
        pull(Reference(folder=artifact), tmp_path / "back", quiet)


def test_two_pulls_to_one_folder_do_not_mix(artifact: Path, tmp_path: Path) -> None:
    def second(path: str, count: int) -> None:
        with pytest.raises(UsageError, match="another pull"):
            pull(Reference(folder=artifact), tmp_path / "back", quiet)

    pull(Reference(folder=artifact), tmp_path / "back", second)


def test_an_upload_that_breaks_goes_on_where_the_registry_says(double: Double, artifact: Path) -> None:
    broken: list[str] = []

    def spoil(handler: Any) -> bool:
        if handler.command != "PATCH" or handler.path in broken:
            return False
        broken.append(handler.path)
        handler.double.uploads[handler.path] += handler.body[:5]  # five bytes came, then the line broke
        handler.close_connection = True
        handler.connection.close()
        return True

    double.spoil = spoil
    push(artifact, at(double), quiet)
    assert len(broken) >= 5
    for content in tree(artifact).values():
        assert double.blobs[digest_of(content)] == content


# --- what is there already -------------------------------------------------------------------------------------------


def test_an_artifact_is_replaced_and_anything_else_is_not(artifact: Path, maker: Maker, tmp_path: Path) -> None:
    maker.write(tmp_path / "new", "second")
    pull(Reference(folder=tmp_path / "new"), artifact, quiet)
    assert tree(artifact) == tree(tmp_path / "new")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/letter").touch()
    with pytest.raises(UsageError, match="no artifact"):
        pull(Reference(folder=tmp_path / "new"), tmp_path / "mine", quiet)
    (artifact / "tokenizer.json").write_text("damaged, and longer or shorter")
    with pytest.raises(UsageError, match="not replaced"):
        pull(Reference(folder=tmp_path / "new"), artifact, quiet)
    pull(Reference(folder=tmp_path / "new"), artifact, quiet, force=True)
    assert tree(artifact) == tree(tmp_path / "new")


def test_what_is_not_accepted_is_not_kept_in_place(artifact: Path, tmp_path: Path) -> None:
    def refuse(opened: OpenArtifact) -> None:
        raise VerificationError(f"{opened.manifest.name} is not signed")

    with pytest.raises(VerificationError, match="not signed"):
        pull(Reference(folder=artifact), tmp_path / "back", quiet, accept=refuse)
    assert not (tmp_path / "back").exists()


def test_a_damaged_artifact_is_not_pushed(double: Double, artifact: Path) -> None:
    (artifact / "extra").touch()
    with pytest.raises(VerificationError, match="extra"):
        push(artifact, at(double), quiet)
    assert double.requests == []


def test_a_disk_that_is_too_small_is_told_before(
    double: Double, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(artifact, at(double), quiet)
    before = len(double.requests)
    monkeypatch.setattr(transfer.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(ResourceError, match="no room"):
        pull(at(double), tmp_path / "back", quiet)
    assert len(double.requests) == before + 1


# --- a hostile registry ----------------------------------------------------------------------------------------------


def changed(change: Callable[[dict[str, Any]], object]) -> Callable[[Double], None]:
    def apply(double: Double) -> None:
        value = json.loads(double.manifests["v1"])
        change(value)
        double.manifests["v1"] = json.dumps(value).encode()

    return apply


def named(path: object) -> Callable[[Double], None]:
    return changed(lambda m: m["layers"][0]["annotations"].update({PATH_KEY: path}))


def raw(content: bytes) -> Callable[[Double], None]:
    return lambda double: double.manifests.update(v1=content)


def spoiling(part: str, answer: Callable[[Any], object]) -> Callable[[Double], None]:
    def spoil(handler: Any) -> bool:
        if part not in handler.path or handler.command != "GET":
            return False
        answer(handler)
        return True

    return lambda double: setattr(double, "spoil", spoil)


def endless(handler: Any) -> None:
    handler.send_response(200)
    handler.end_headers()
    handler.close_connection = True
    try:
        while True:
            handler.wfile.write(bytes(1 << 16))
    except OSError:
        pass


HOSTILE: dict[str, tuple[Callable[[Double], None], type[IngotError], str]] = {
    "a name that climbs out": (named("../../outside"), VerificationError, "relative path"),
    "an absolute name": (named("/etc/passwd"), VerificationError, "relative path"),
    "a name with a backslash": (named("a\\b"), VerificationError, "relative path"),
    "a name with a NUL": (named("a\0b"), VerificationError, "relative path"),
    "a hidden name": (named(".ssh/keys"), VerificationError, "relative path"),
    "a name that is a number": (named(7), VerificationError, "no file name"),
    "a name twice": (changed(lambda m: m["layers"].append(m["layers"][0])), VerificationError, "the same file"),
    "a name that differs in case": (named("MANIFEST.json"), VerificationError, "the same file"),
    "a name below a file": (named("manifest.json/x"), VerificationError, "lies in a file"),
    "no manifest among the files": (changed(lambda m: m.update(layers=[x for x in m["layers"] if x["annotations"][
        PATH_KEY] != "manifest.json"])), VerificationError, "no manifest.json"),
    "no layers": (changed(lambda m: m.pop("layers")), VerificationError, "expected a list"),
    "ten thousand layers": (changed(lambda m: m.update(layers=m["layers"] * 1000)), VerificationError, "at most"),
    "a digest of another kind": (changed(lambda m: m["layers"][0].update(digest="md5:0")), VerificationError, "sha256"),
    "a negative size": (changed(lambda m: m["layers"][0].update(size=-1)), VerificationError, "no size"),
    "a size as text": (changed(lambda m: m["layers"][0].update(size="1")), VerificationError, "no size"),
    "a size beyond every disk": (changed(lambda m: m["layers"][0].update(size=1 << 49)), ResourceError, "no room"),
    "a larger size than it sends": (changed(lambda m: m["layers"][0].update(size=m["layers"][0]["size"] + 1)),
                                    ResourceError, "broke off"),
    "a smaller size than it sends": (changed(lambda m: m["layers"][0].update(size=m["layers"][0]["size"] - 1)),
                                     VerificationError, "not what its digest names"),
    "a container image": (changed(lambda m: m.pop("artifactType")), VerificationError, "no artifact was pushed"),
    "an archive for a layer": (changed(lambda m: m["layers"][0].update(mediaType="application/tar+gzip")),
                               VerificationError, "archive"),
    "a manifest that is no JSON": (raw(b"<html>"), VerificationError, "not JSON"),
    "a manifest nested without end": (raw(b"[" * 100_000), VerificationError, "nested"),
    "a manifest without end": (spoiling("/manifests/", endless), VerificationError, "too much"),
    "a blob without end": (spoiling("/blobs/", endless), VerificationError, "not what its digest names"),
    "another blob": (lambda d: d.blobs.update({k: v[::-1] for k, v in d.blobs.items()}), VerificationError, "digest"),
    "a blob that is not there": (lambda d: d.blobs.clear(), ResourceError, "404"),
    "a digest that is not the manifest's": (spoiling("/manifests/", lambda h: h.answer(
        200, h.double.manifests["v1"], Docker_Content_Digest=PIN)), VerificationError, "not the one it names"),
    "redirects without end": (spoiling("/v2/", lambda h: h.answer(302, Location=h.path)), VerificationError, "circles"),
    "a redirect to a file": (spoiling("/v2/", lambda h: h.answer(302, Location="file:///etc/passwd")),
                             VerificationError, "only TLS"),
    "a redirect to ftp": (spoiling("/v2/", lambda h: h.answer(302, Location="ftp://x")), VerificationError, "only TLS"),
    "a redirect that is no address": (spoiling("/v2/", lambda h: h.answer(302, Location="http://a b/c")),
                                      ResourceError, "cannot be reached"),
    "another part than asked for": (lambda d: setattr(d, "spoil", _other_part), ResourceError, "another part"),
    "an answer that is no HTTP": (spoiling("/v2/", lambda h: h.wfile.write(b"\0" * 100)), ResourceError, "reached"),
    "a login of an unknown kind": (spoiling("/v2/", lambda h: h.answer(401, WWW_Authenticate="Magic x")),
                                   ResourceError, "unknown login"),
    "a login that gives no token": (spoiling("", lambda h: h.answer(401, b"{}", WWW_Authenticate=(
        f'Bearer realm="http://{h.double.host}/token",service="x"'))), ResourceError, "no token"),
    "a login elsewhere without TLS": (spoiling("/v2/", lambda h: h.answer(401, WWW_Authenticate=(
        'Bearer realm="file:///etc/passwd"'))), VerificationError, "only TLS"),
    "a refusal": (spoiling("/v2/", lambda h: h.answer(403)), ResourceError, "403"),
    "a failure": (spoiling("/v2/", lambda h: h.answer(500, b"\x1b[2J")), ResourceError, "500"),
    "nothing under that name": (lambda d: d.manifests.clear(), UsageError, "no such artifact"),
}  # fmt: skip


def _other_part(handler: Any) -> bool:
    start = handler.headers.get("Range")
    if start and "/blobs/" in handler.path:
        handler.answer(206, b"abc", Content_Range="bytes 0-2/3")
        return True
    return breaking_off(3)(handler)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_registry_ends_in_one_error(double: Double, artifact: Path, tmp_path: Path, name: str) -> None:
    push(artifact, at(double), quiet)
    spoil, kind, word = HOSTILE[name]
    spoil(double)
    before = {path for path in tmp_path.parent.rglob("*") if ".ingot-pull" not in path.as_posix()}
    with pytest.raises(kind) as caught:
        pull(at(double), tmp_path / "back", quiet)
    assert word in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert {path for path in tmp_path.parent.rglob("*") if ".ingot-pull" not in path.as_posix()} == before


def test_an_intact_image_of_a_broken_artifact_is_refused(double: Double, artifact: Path, tmp_path: Path) -> None:
    push(artifact, at(double), quiet)
    content = b"other tokenizer"
    double.blobs[digest_of(content)] = content

    def change(manifest: dict[str, Any]) -> None:
        [layer] = [x for x in manifest["layers"] if x["annotations"][PATH_KEY] == "tokenizer.json"]
        layer.update(digest=digest_of(content), size=len(content))

    changed(change)(double)
    with pytest.raises(VerificationError, match=r"tokenizer\.json"):
        pull(at(double), tmp_path / "back", quiet)
    assert not (tmp_path / "back").exists()


KEYS = st.sampled_from(["config", "layers", "digest", "size", "mediaType", "annotations", PATH_KEY])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=6),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(VALUES)
def test_reading_an_image_is_total(value: object) -> None:
    if isinstance(value, dict):
        value |= {"schemaVersion": 2, "artifactType": ARTIFACT_TYPE}
    with pytest.raises(VerificationError):
        read_image(json.dumps(value).encode(), "the manifest")


# --- logging in ------------------------------------------------------------------------------------------------------


def log_in(tmp_path: Path, host: str) -> None:
    auth = base64.b64encode(b"ada:pass:word").decode()
    (tmp_path / "home/.docker").mkdir(parents=True)
    (tmp_path / "home/.docker/config.json").write_text(json.dumps({"auths": {host: {"auth": auth}}}))


def basic(handler: Any) -> bool:
    if handler.headers.get("Authorization") == "Basic " + base64.b64encode(b"ada:pass:word").decode():
        return False
    handler.answer(401, WWW_Authenticate='Basic realm="x"')
    return True


def bearer(handler: Any) -> bool:
    if handler.path.startswith("/token?"):
        known = not basic(handler)
        if known:
            assert "scope=repository%3Ateam%2Fdemo%3Apull" in handler.path
            handler.answer(200, b'{"token": "abc.def"}')
        return True
    if handler.headers.get("Authorization") == "Bearer abc.def":
        return False
    realm = f"http://{handler.double.host}/token"
    handler.answer(401, WWW_Authenticate=f'Bearer realm="{realm}",service="x",scope="repository:team/demo:pull"')
    return True


@pytest.mark.parametrize("spoil", [basic, bearer])
def test_credentials_come_from_dockers_file(
    double: Double, artifact: Path, tmp_path: Path, spoil: Callable[[Any], bool]
) -> None:
    double.spoil = spoil
    with pytest.raises(ResourceError):
        push(artifact, at(double), quiet)
    log_in(tmp_path, double.host)
    push(artifact, at(double), quiet)
    pull(at(double), tmp_path / "back", quiet)
    assert tree(tmp_path / "back") == tree(artifact)


def test_credentials_do_not_follow_a_redirect(double: Double, artifact: Path, tmp_path: Path) -> None:
    log_in(tmp_path, double.host)
    push(artifact, at(double), quiet)
    with serve() as other:
        other.blobs = double.blobs

        def spoil(handler: Any) -> bool:
            if basic(handler):
                return True
            if "/blobs/" in handler.path:
                handler.answer(307, Location=f"http://{other.host}{handler.path}")
                return True
            return False

        double.spoil = spoil
        pull(at(double), tmp_path / "back", quiet)
        assert tree(tmp_path / "back") == tree(artifact)
        assert other.headers and all("Authorization" not in headers for headers in other.headers)


@pytest.mark.parametrize(
    "content", ["{", '{"auths": 3}', '{"auths": {"HOST": {"auth": "%"}}}', '{"auths": {"HOST": 3}}']
)
def test_a_broken_credentials_file_is_a_usage_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UsageError, match=r"config\.json"):
        http.stored_credentials("HOST", tmp_path / "config.json")


def test_tls_is_not_left(monkeypatch: pytest.MonkeyPatch) -> None:
    client = http.Http(Reference.parse("example.com/a"), False, None)
    client.check_url("https://other.com/b")
    with pytest.raises(VerificationError, match="only TLS"):
        client.check_url("http://example.com/b")


def test_descriptors_come_back(double: Double, artifact: Path, tmp_path: Path) -> None:
    push(artifact, at(double), quiet)
    before = len(os.listdir("/proc/self/fd"))
    double.spoil = breaking_off(9)
    pull(at(double), tmp_path / "back", quiet)
    assert len(os.listdir("/proc/self/fd")) <= before + 2  # the server's own may be a moment late
