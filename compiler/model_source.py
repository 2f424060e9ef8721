"""Where the model's files are: a local folder, or a pinned commit fetched from the Hugging Face hub.

Only what a build reads is fetched: config, safetensors, tokenizer and chat template. Code and pickles stay where
they are.
"""

from __future__ import annotations

from pathlib import Path

from ..artifacts.errors import ResourceError, UsageError
from .recipe import Recipe

HUB_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
]


def resolve_source(recipe: Recipe) -> Path:
    """The folder that holds the model; for random weights the config file. Fetches a hub model if need be.

    Raises:
        UsageError: the recipe's source is incomplete, or does not exist.
        ResourceError: the hub could not be reached, or refuses.
    """
    recipe.check_source()
    if recipe.model.source == "local":
        return recipe.model_path()
    if recipe.model.source == "random":
        return recipe.config_path()
    model = f"{recipe.model.id}@{recipe.model.revision[:12]}"
    fix = "pass --model DIR with a copy of the model, or --set source=random if only its shape matters"
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ResourceError(f"{model} cannot be fetched", str(error), 'pip install "ingot[compile]"') from error
    try:
        folder = snapshot_download(recipe.model.id, revision=recipe.model.revision, allow_patterns=HUB_FILES)
    except KeyboardInterrupt:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()
        name = type(error).__name__
        if name == "GatedRepoError":
            fix = f"accept its licence at https://huggingface.co/{recipe.model.id}, then `hf auth login`"
        elif name in ("RepositoryNotFoundError", "RevisionNotFoundError"):
            fix = "check model.id and model.revision; a private model needs `hf auth login`"
        raise ResourceError(
            f"{model} cannot be fetched from the hub", f"{name}: {reason[0][:300] if reason else ''}", fix
        ) from error
    return Path(folder)


def check_output(recipe: Recipe, output: Path) -> None:
    """Raise UsageError if `output` would stand in, on or around the model or the recipe it is built from."""
    inputs = {"the recipe's folder": recipe.folder}
    if recipe.model.source == "local":
        inputs["the model's folder"] = recipe.model_path()
    try:
        target = output.resolve()
        for what, folder in inputs.items():
            source = folder.resolve()
            # Below the recipe's folder is fine (`-o demo` beside demo.toml); below the model's it is not.
            inside = target.is_relative_to(source) and what != "the recipe's folder"
            if target == source or inside or source.is_relative_to(target):
                raise UsageError(
                    f"--output {output}: refused",
                    f"it is, or holds, or lies in {what} ({folder})",
                    "choose a folder of its own, for example artifacts/built/NAME",
                )
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"--output {str(output)!a}: no usable path", str(error), "choose another folder") from None
