"""The bill of materials of a build's toolchain: every Python package that had a hand in it, and the C++ compiler.

Made by the CycloneDX project's own library; without it (it comes with `ingot[compile]`) a build has no such file.
"""

from __future__ import annotations

import importlib.metadata
import re

from ..artifacts.manifest import Manifest

_ROOTS = ("torch", "transformers", "safetensors", "tokenizers", "numpy", "triton")


def bill_of_materials(manifest: Manifest) -> bytes | None:
    """A CycloneDX 1.6 document about the artifact of this manifest, or None where the library is not installed."""
    try:
        from cyclonedx.model import HashAlgorithm, HashType
        from cyclonedx.model.bom import Bom
        from cyclonedx.model.component import Component, ComponentType
        from cyclonedx.output.json import JsonV1Dot6
        from packageurl import PackageURL
    except ImportError:
        return None
    packages = installed_closure(_ROOTS)
    parts = {
        name: Component(
            name=name, version=version, type=ComponentType.LIBRARY, bom_ref=f"pypi:{name}",
            purl=PackageURL("pypi", None, name, version),
        )
        for name, (version, _) in packages.items()
    }  # fmt: skip
    ingot = Component(name="ingot", version=manifest.ingot_version, type=ComponentType.APPLICATION, bom_ref="ingot")
    tools = [ingot, *(parts[name] for name in _ROOTS if name in parts)]
    if compiler := manifest.toolchain.get("compiler"):
        tools.append(Component(name="c++", version=compiler, type=ComponentType.APPLICATION, bom_ref="c++"))
    digest = HashType(alg=HashAlgorithm.SHA_256, content=manifest.digest())
    artifact = Component(
        name=manifest.name, type=ComponentType.MACHINE_LEARNING_MODEL, bom_ref="artifact", hashes=[digest]
    )
    bom = Bom(components={*parts.values(), *tools})
    bom.metadata.component = artifact
    bom.register_dependency(artifact, tools)
    for name, (_, needs) in packages.items():
        bom.register_dependency(parts[name], [parts[need] for need in needs])
    return (JsonV1Dot6(bom).output_as_string(indent=1) + "\n").encode()


def installed_closure(roots: tuple[str, ...]) -> dict[str, tuple[str, list[str]]]:
    """Name to (version, names it needs) of these packages and all that they need, as far as they are installed.

    Requirements are read by name alone: a marker for another system names a package that is not installed.
    """
    found: dict[str, tuple[str, list[str]]] = {}
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        try:
            package = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        wanted = [need for need in package.requires or () if "extra ==" not in need]
        needs = {_normal(match[0]) for need in wanted if (match := re.match(r"[\w.-]+", need))}
        found[name] = (package.version, sorted(needs))
        waiting += needs
    return {name: (version, [n for n in needs if n in found]) for name, (version, needs) in sorted(found.items())}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
