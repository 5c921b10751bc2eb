"""Trains a codebook on one process and on two, with and without broadcasting of buffers; on CPU, with gloo.

usage: codebook_processes.py FOLDER

Writes FOLDER/P-broadcast-rank.safetensors, the state of the model on each process.
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from checkpoint_processes import run
from safetensors.torch import save_file

from annealers import VQVAEModel

STEPS, BATCH = 3, 8


def train(folder, broadcast_buffers):
    torch.set_num_threads(1)
    accelerator = Accelerator(
        cpu=True, kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=broadcast_buffers)]
    )
    torch.manual_seed(0)
    model = VQVAEModel(
        in_channels=1,
        sample_size=8,
        block_out_channels=(8, 8),
        latent_channels=4,
        num_vq_embeddings=16,
        decay=0.5,
        restart_threshold=0.3,
        mid_block_add_attention=False,
    )
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1e-3))
    bare = accelerator.unwrap_model(model)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        images = torch.rand(BATCH, 1, 8, 8, generator=generator) * 2 - 1
        priority = torch.rand(BATCH, 4, 4, generator=generator)
        share = BATCH // accelerator.num_processes
        mine = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
        output = model(images[mine], priority[mine])
        accelerator.backward((output.nll / 64 + 0.25 * output.commitment).mean())
        optimizer.step()
        optimizer.zero_grad()
        bare.update_codebook()
    name = f"{accelerator.num_processes}-{broadcast_buffers}-{accelerator.process_index}.safetensors"
    save_file({key: value.contiguous() for key, value in bare.state_dict().items()}, folder / name)
    accelerator.end_training()


if __name__ == "__main__":
    destination = Path(sys.argv[1])
    run(1, train, destination, True)
    run(2, train, destination, False)
    run(2, train, destination, True)
