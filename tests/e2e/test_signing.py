"""`ingot sign` and `ingot verify --key`, as a user types them, and model-signing's own command line on the result."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from ingot.artifacts.manifest import PROVENANCE, SBOM, load_manifest

from ..conftest import Demo

Ingot = Callable[..., CompletedProcess[str]]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two pairs of keys: a.pem and a.pub, b.pem and b.pub, made as the documentation says."""
    folder = tmp_path_factory.mktemp("keys")
    for name in "ab":
        for command in (
            ["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", f"{name}.pem"],
            ["ec", "-in", f"{name}.pem", "-pubout", "-out", f"{name}.pub"],
        ):
            done = subprocess.run(["openssl", *command], cwd=folder, capture_output=True, check=False)
            if done.returncode:
                pytest.skip("needs openssl")
    return folder


@pytest.fixture(scope="module")
def signed(demo: Demo, keys: Path, ingot: Ingot, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = demo.copy(tmp_path_factory.mktemp("signed") / "artifact")
    done = ingot("sign", root, "--key", keys / "a.pem")
    assert done.returncode == 0, done.stderr
    assert "signed" in done.stdout and load_manifest(root).digest() in done.stdout
    return root


def model_signing(*words: object) -> CompletedProcess[str]:
    command = [sys.executable, "-m", "model_signing", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_a_signature_is_verified_by_its_key(signed: Path, keys: Path, ingot: Ingot) -> None:
    done = ingot("verify", signed, "--key", keys / "a.pub")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"signed by {keys / 'a.pub'}" in done.stdout
    either = ingot("verify", signed, "--key", keys / "b.pub", "--key", keys / "a.pub", "--json")
    assert json.loads(either.stdout)["signed_by"] == str(keys / "a.pub")
    assert "without --key" in ingot("verify", signed).stdout


def test_another_key_an_unsigned_and_an_extended_folder_are_refused(
    demo: Demo, signed: Path, keys: Path, ingot: Ingot, tmp_path: Path
) -> None:
    extended = Demo(demo.recipe, demo.model, signed, demo.build).copy(tmp_path / "artifact")
    (extended / "engines/more.so").touch()
    for folder, key, word in (
        (signed, "b.pub", "another key"),
        (demo.artifact, "a.pub", "not signed"),
        (extended, "a.pub", "engines/more.so"),
    ):
        done = ingot("verify", folder, "--key", keys / key)
        assert (done.returncode, done.stdout) == (4, "")
        assert word in done.stderr and "Traceback" not in done.stderr


def test_run_accepts_by_signature_alone(signed: Path, keys: Path, ingot: Ingot) -> None:
    words = ("run", signed, "Once", "--max-tokens=2", "--json")
    good = ingot(*words, f"--trust=signed:{keys / 'a.pub'}")
    assert good.returncode == 0, good.stderr
    bad = ingot(*words, f"--trust=signed:{keys / 'b.pub'}")
    assert (bad.returncode, bad.stdout) == (4, "")
    assert ingot(*words, "--trust=somebody").returncode == 2


def test_model_signing_verifies_what_we_sign(signed: Path, keys: Path, tmp_path: Path) -> None:
    pytest.importorskip("model_signing")
    words = ("verify", "key", signed, "--signature", signed / "model.sig", "--public_key")
    good = model_signing(*words, keys / "a.pub")
    assert good.returncode == 0, good.stdout + good.stderr
    assert model_signing(*words, keys / "b.pub").returncode != 0


def test_we_verify_what_model_signing_signs(demo: Demo, keys: Path, ingot: Ingot, tmp_path: Path) -> None:
    pytest.importorskip("model_signing")
    root = demo.copy(tmp_path / "artifact")
    done = model_signing("sign", "key", root, "--signature", root / "model.sig", "--private_key", keys / "a.pem")
    assert done.returncode == 0, done.stdout + done.stderr
    assert ingot("verify", root, "--key", keys / "a.pub").returncode == 0


def test_signing_again_replaces_the_signature(demo: Demo, keys: Path, ingot: Ingot, tmp_path: Path) -> None:
    root = demo.copy(tmp_path / "artifact")
    for name in "ab":
        facts = json.loads(ingot("sign", root, "--key", keys / f"{name}.pem", "--json").stdout)
        assert facts["digest"] == load_manifest(root).digest()
        assert ingot("verify", root, "--key", keys / f"{name}.pub").returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_a_damaged_artifact_is_not_signed(demo: Demo, keys: Path, ingot: Ingot, tmp_path: Path) -> None:
    root = demo.copy(tmp_path / "artifact")
    (root / "more").touch()
    done = ingot("sign", root, "--key", keys / "a.pem")
    assert done.returncode == 4 and "more" in done.stderr
    assert not (root / "model.sig").exists()


@pytest.mark.parametrize("words", [("--key", "absent"), ("--key", "{keys}/a.pub"), ()])
def test_wrong_keys_exit_with_2(demo: Demo, keys: Path, ingot: Ingot, words: tuple[str, ...]) -> None:
    done = ingot("sign", demo.artifact, *(word.format(keys=keys) for word in words))
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr


def test_verifying_imports_no_torch(signed: Path, keys: Path) -> None:
    code = """
import sys
from ingot.compiler.cli import main
assert main(["verify", sys.argv[1], "--key", sys.argv[2]]) == 0
print([name for name in ("torch", "transformers", "ingot.compiler.builder") if name in sys.modules])
"""
    command = [sys.executable, "-c", code, str(signed), str(keys / "a.pub")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_a_build_attests_itself(demo: Demo) -> None:
    manifest = load_manifest(demo.artifact)
    statement = json.loads((demo.artifact / PROVENANCE).read_text())
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    assert statement["predicateType"] == "https://slsa.dev/provenance/v1"
    assert statement["subject"] == [{"name": "tiny", "digest": {"sha256": manifest.digest()}}]
    definition, run = (statement["predicate"][name] for name in ("buildDefinition", "runDetails"))
    assert definition["externalParameters"]["recipe"]["name"] == "tiny"
    [weights, *tools] = definition["resolvedDependencies"]
    assert weights["digest"] == {"ingotTensorsSha256": manifest.recipe["weights_digest"]}
    assert f"pkg:pypi/torch@{manifest.toolchain['torch']}" in [tool["uri"] for tool in tools]
    assert run["metadata"]["startedOn"] <= run["metadata"]["finishedOn"]
    assert run["byproducts"][0]["annotations"]["stage_s"]["engines"] > 0


def test_the_bill_of_materials_names_the_toolchain(demo: Demo) -> None:
    bom = json.loads((demo.artifact / SBOM).read_text())
    assert (bom["bomFormat"], bom["specVersion"]) == ("CycloneDX", "1.6")
    manifest = load_manifest(demo.artifact)
    assert bom["metadata"]["component"]["hashes"] == [{"alg": "SHA-256", "content": manifest.digest()}]
    versions = {part["name"]: part["version"] for part in bom["components"]}
    for name in ("torch", "transformers", "ingot"):
        assert versions[name] == manifest.toolchain[name]
    assert versions["c++"] == manifest.toolchain["compiler"]
    assert "pytest" not in versions
    needs = {entry["ref"]: entry.get("dependsOn", []) for entry in bom["dependencies"]}
    assert "pypi:torch" in needs["artifact"] and "pypi:sympy" in needs["pypi:torch"]
