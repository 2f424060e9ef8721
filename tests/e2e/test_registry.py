"""Push, pull and run through a real registry on loopback: Debian's docker-registry, or upstream's `registry`."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from ingot.artifacts.manifest import load_manifest

from ..conftest import Demo

Ingot = Callable[..., CompletedProcess[str]]
# bcrypt of "secret", as `htpasswd -B` makes it
HTPASSWD = "ada:$2b$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n"


def serve(folder: Path, login: bool) -> Iterator[str]:
    """A registry's host and port; it keeps its blobs below `folder`."""
    server = shutil.which("docker-registry") or shutil.which("registry")
    if server is None:
        pytest.skip("needs a registry server: apt-get install docker-registry")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{probe.getsockname()[1]}"
    (folder / "htpasswd").write_text(HTPASSWD)
    auth = f"auth: {{htpasswd: {{realm: test, path: {folder / 'htpasswd'}}}}}\n" if login else ""
    (folder / "config.yml").write_text(
        f"version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {folder / 'data'}}}}}\n"
        f"http: {{addr: '{host}'}}\n{auth}"
    )
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen([server, "serve", folder / "config.yml"], stdout=log, stderr=log)
    try:
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", int(host.rpartition(":")[2]))) == 0:
                    break
            assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.05)
        yield host
    finally:
        process.terminate()
        process.wait(10)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from serve(tmp_path_factory.mktemp("registry"), login=False)


@pytest.fixture()
def registry_with_login(tmp_path: Path) -> Iterator[str]:
    yield from serve(tmp_path, login=True)


def test_push_pull_verify_run(registry: str, demo: Demo, ingot: Ingot, tmp_path: Path) -> None:
    pushed = ingot("push", demo.artifact, f"{registry}/team/demo:v1", "--json")
    assert pushed.returncode == 0, pushed.stderr
    facts = json.loads(pushed.stdout)
    assert facts["digest"] == load_manifest(demo.artifact).digest()
    pulled = ingot("pull", f"{registry}/team/demo:v1@{facts['image']}", "-o", tmp_path / "demo")
    assert pulled.returncode == 0, pulled.stderr
    assert facts["image"] in pulled.stdout and f"--trust digest:sha256:{facts['digest']}" in pulled.stdout
    assert ingot("verify", tmp_path / "demo").returncode == 0
    done = ingot(
        "run", tmp_path / "demo", "Once", "--max-tokens=3", "--json", f"--trust=digest:sha256:{facts['digest']}"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["token_ids"]


def test_nothing_is_sent_twice_and_tags_move(registry: str, demo: Demo, ingot: Ingot, tmp_path: Path) -> None:
    for tag in ("a", "b"):
        assert ingot("push", demo.artifact, f"{registry}/tags/demo:{tag}").returncode == 0
    missing = ingot("pull", f"{registry}/tags/demo:c", "-o", tmp_path / "c")
    assert (missing.returncode, missing.stdout) == (2, "")
    assert "no such artifact" in missing.stderr


def test_an_interrupted_pull_resumes(registry: str, demo: Demo, ingot: Ingot, tmp_path: Path) -> None:
    assert ingot("push", demo.artifact, f"{registry}/team/demo:v1").returncode == 0
    weights = (demo.artifact / "weights/model.safetensors").read_bytes()
    part = tmp_path / ".demo.ingot-pull/new/weights/model.safetensors"
    part.parent.mkdir(parents=True)
    (tmp_path / ".demo.ingot-pull").chmod(0o700)
    part.write_bytes(weights[: len(weights) // 2])
    inode = part.stat().st_ino
    assert ingot("pull", f"{registry}/team/demo:v1", "-o", tmp_path / "demo").returncode == 0
    assert (tmp_path / "demo/weights/model.safetensors").stat().st_ino == inode
    assert (tmp_path / "demo/weights/model.safetensors").read_bytes() == weights


def test_a_layer_that_was_changed_in_the_registry_is_refused(
    demo: Demo, ingot: Ingot, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("spoiled")
    for registry in serve(folder, login=False):
        assert ingot("push", demo.artifact, f"{registry}/team/demo:v1").returncode == 0
        blobs = [path for path in (folder / "data").rglob("data") if path.is_file()]
        weights = max(blobs, key=lambda path: path.stat().st_size)
        content = bytearray(weights.read_bytes())
        content[len(content) // 2] ^= 1
        weights.write_bytes(content)
        done = ingot("pull", f"{registry}/team/demo:v1", "-o", tmp_path / "demo")
        assert done.returncode == 4, done.stderr
        assert "not what its digest names" in done.stderr
        assert not (tmp_path / "demo").exists()


def test_a_login_is_taken_from_dockers_file(
    registry_with_login: str, demo: Demo, ingot: Ingot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ("push", demo.artifact, f"{registry_with_login}/team/demo:v1")
    refused = ingot(*words)
    assert refused.returncode == 5 and "docker login" in refused.stderr
    (tmp_path / ".docker").mkdir()
    auth = base64.b64encode(b"ada:secret").decode()
    (tmp_path / ".docker/config.json").write_text(json.dumps({"auths": {registry_with_login: {"auth": auth}}}))
    assert ingot(*words).returncode == 0
