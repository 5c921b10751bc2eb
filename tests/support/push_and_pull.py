"""Pushes to and pulls from the Hub that HF_ENDPOINT names: `python this.py folder token`.

What the test must know is written to `folder/report.json`; the images of each pulled pipeline to `folder/<name>.pt`.
"""

import json
import os
import sys
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi
from saved_pipelines import guided_images, guided_pipeline, images_of_diffusers, pipeline_of_diffusers

from annealers.hub import model_card, push_folder
from annealers.pipelines import AnnealersPipeline, GuidedDiffusionPipeline


def main(folder, token):
    report = {}
    pipeline = guided_pipeline()

    # a pipeline by itself, private; then again, which must leave the card alone
    report["commit"] = str(pipeline.push_to_hub("me/plain", private=True, token=token, commit_message="First"))
    HfApi(token=token).upload_file(path_or_fileobj=b"# Mine\n", path_in_repo="README.md", repo_id="me/plain")
    pipeline.null_label = None
    pipeline.push_to_hub("me/plain", private=True, token=token)
    pulled = GuidedDiffusionPipeline.from_pretrained("me/plain", token=token)
    report["plain"] = [pulled.null_label, pulled.name_or_path, pulled.id2label == pipeline.id2label]
    weights, pulled_weights = pipeline.unet.state_dict(), pulled.unet.state_dict()
    report["equal weights"] = all(torch.equal(weights[name], pulled_weights[name]) for name in weights)
    pulled.null_label = 3
    torch.save(guided_images(pulled), folder / "plain.pt")

    # once more from the cache alone
    cached = GuidedDiffusionPipeline.from_pretrained("me/plain", local_files_only=True)
    report["cached"] = type(cached).__name__

    # a run's folder: card and picture go, optimizer and checkpoints stay
    run = folder / "run"
    guided_pipeline().save_pretrained(run)
    record = {"pipeline": "GuidedDiffusionPipeline", "command": f"train.py --hub_token {token}", "samples": "s.png"}
    model_card(record, "me/run").save(run / "README.md")
    (run / "s.png").write_bytes(b"picture")
    for other in (
        "optimizer.bin",
        "random_states_0.pkl",
        "metrics.jsonl",
        "checkpoint-5/optimizer.bin",
        "samples/5.png",
    ):
        (run / other).parent.mkdir(exist_ok=True)
        (run / other).write_bytes(b"not part of the pipeline")
    push_folder(run, "me/run", token=token)

    # with code, loaded by Diffusers alone and by us
    guided_pipeline().push_to_hub("me/coded", token=token, with_code=True)
    os.environ["HF_TOKEN"] = token  # Diffusers does not pass `token` on when it fetches code
    coded = DiffusionPipeline.from_pretrained("me/coded", trust_remote_code=True)
    del os.environ["HF_TOKEN"]
    torch.save(guided_images(coded), folder / "coded.pt")
    native = AnnealersPipeline.from_pretrained("me/coded", token=token)
    report["coded"] = [type(coded) is GuidedDiffusionPipeline, type(native) is GuidedDiffusionPipeline]

    # a pipeline of Diffusers with our scheduler, pushed by Diffusers
    pipeline_of_diffusers().push_to_hub("me/theirs", token=token)
    theirs = AnnealersPipeline.from_pretrained("me/theirs", token=token)
    torch.save(images_of_diffusers(theirs), folder / "theirs.pt")
    report["theirs"] = [type(theirs).__name__, type(theirs.scheduler).__name__]

    # private is not taken for done on a public repository
    try:
        guided_pipeline().push_to_hub("me/run", private=True, token=token, commit_message="Never")
    except ValueError as error:
        report["refused"] = str(error)

    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
