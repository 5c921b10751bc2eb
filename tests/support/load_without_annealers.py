"""Loads exported pipelines in a process where annealers cannot be imported: `python this.py folder`.

Each `folder/<name>` is an export; its images are written to `folder/<name>.pt` and what Diffusers warned of, together
with the facts to check, to `folder/report.json`.
"""

import json
import logging
import sys
from pathlib import Path


class NoAnnealers:
    """Import hook under which annealers is not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "annealers":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, NoAnnealers())

import torch  # noqa: E402
from diffusers import DiffusionPipeline  # noqa: E402
from diffusers.utils import logging as diffusers_logging  # noqa: E402
from saved_pipelines import guided_images, images_of_diffusers  # noqa: E402


class Kept(logging.Handler):
    messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


def main(folder):
    diffusers_logging.add_handler(Kept())
    report = {}
    for name, draw in {"ours": guided_images, "theirs": images_of_diffusers, "ours again": guided_images}.items():
        source = folder / name.split()[0]
        pipeline = DiffusionPipeline.from_pretrained(source, trust_remote_code=True)
        torch.save(draw(pipeline), folder / f"{name}.pt")
        pipeline.save_pretrained(folder / f"{name} saved")
        report[name] = [type(pipeline).__name__, type(pipeline.scheduler).__name__]
    report["warnings"] = Kept.messages
    report["annealers"] = sorted(module for module in sys.modules if module.split(".")[0] == "annealers")
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
