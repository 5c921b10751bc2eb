"""What open_clip knows a model by."""

from typing import Any

import open_clip

SCHEMAS = ("hf-hub:", "local-dir:")


def open_clip_config(name: str) -> tuple[str, dict[str, Any]]:
    """The name as open_clip's functions take it, and the config that it stands for.

    Args:
        name: "ViT-B-32" and the others of `open_clip.list_models()`, OpenAI's "ViT-B/32", "hf-hub:user/name" or
            "local-dir:path".

    Raises:
        ValueError: If open_clip knows no such model.
    """
    name = name if name.startswith(SCHEMAS) else name.replace("/", "-")
    config = open_clip.get_model_config(name)
    if config is None:
        raise ValueError(
            f"open_clip knows no model {name!r}: see open_clip.list_models(), or name one as 'hf-hub:user/name' or "
            f"'local-dir:path'"
        )
    return name, config
