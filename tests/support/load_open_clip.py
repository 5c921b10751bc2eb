"""Loads pipelines with an open_clip tower in a process that has no network and no cache: `python this.py folder`.

First `folder/exported`, where annealers cannot be imported, then `folder/saved`. What each draws, and how it embeds
texts, goes into `folder/<name>.pt`; `folder/report.json` says which files were cached.
"""

import json
import os
import socket
import sys
from pathlib import Path


def no_network(*_, **__):
    raise OSError("this process has no network")


socket.socket.connect = no_network
socket.getaddrinfo = no_network


class NoAnnealers:
    """Import hook under which annealers is not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "annealers":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


hook = NoAnnealers()
sys.meta_path.insert(0, hook)

import torch  # noqa: E402
from diffusers import DiffusionPipeline  # noqa: E402
from tiny_open_clip import TEXTS, drawn  # noqa: E402


@torch.no_grad()
def results(pipeline):
    tokens = pipeline.tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return {"tokens": tokens, "text_embeds": pipeline.text_encoder(tokens).text_embeds, "images": drawn(pipeline)}


def main(folder):
    exported = DiffusionPipeline.from_pretrained(folder / "exported", trust_remote_code=True)
    torch.save(results(exported), folder / "exported.pt")
    before = sorted(module for module in sys.modules if module.split(".")[0] == "annealers")

    sys.meta_path.remove(hook)
    import annealers  # Diffusers loads its components if it is imported

    saved = DiffusionPipeline.from_pretrained(folder / "saved")
    torch.save(results(saved), folder / "saved.pt")
    home = Path(os.environ["HF_HOME"])
    report = {
        "annealers": before,
        "ours": [
            getattr(annealers, type(part).__name__) is type(part) for part in (saved.text_encoder, saved.tokenizer)
        ],
        "cached": [str(path) for path in home.rglob("*") if path.is_file() and "modules" not in path.parts],
    }
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
