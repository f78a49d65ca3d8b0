"""One step of the weighted loss under FSDP2 on CPUs; torchrun starts it in several processes.

usage: fsdp_worker.py MODEL WEIGHTED OUT: writes the loss and the gathered weights after the step.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from cwpo_trainer import losses
from cwpo_trainer.data.weighted import read_weighted, weights_of
from cwpo_trainer.policy.formatting import Formatter
from cwpo_trainer.policy.loading import load_tokenizer
from cwpo_trainer.run.launch import leave


def log_probs(model, formatter, pairs, texts):
    """Of the responses, summed over their tokens, shape (pairs,)."""
    encoded = formatter.tokenise([pair.prompt for pair in pairs], texts)
    width = max(text.tokens for text in encoded)
    ids = torch.zeros((len(encoded), width), dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row, text in enumerate(encoded):
        ids[row, : text.tokens] = torch.tensor(text.prompt_ids + text.response_ids)
        mask[row, : text.tokens] = 1
        labels[row, len(text.prompt_ids) : text.tokens] = torch.tensor(text.response_ids)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    wanted = labels[:, 1:]
    picked = logits.gather(-1, wanted.clamp(min=0)[..., None])[..., 0]
    return (picked * (wanted != -100)).sum(1)


def main(model_folder: Path, data: Path, out: Path) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    reference = AutoModelForCausalLM.from_pretrained(model_folder).requires_grad_(False)
    mesh = init_device_mesh("cpu", (world,))
    for each in (model, reference):
        for layer in each.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(each, mesh=mesh)
    pairs = [*read_weighted(data)]
    confidences = np.array([pair.confidence for pair in pairs], dtype=np.float32)
    weights = torch.from_numpy(weights_of(confidences, "confidence", normalise=True))
    formatter = Formatter(load_tokenizer(model_folder))
    mine = slice(rank * len(pairs) // world, (rank + 1) * len(pairs) // world)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5)
    total = []
    for _ in range(2):
        part = pairs[mine]
        chosen, rejected = [pair.chosen for pair in part], [pair.rejected for pair in part]
        with torch.no_grad():
            of_reference = [log_probs(reference, formatter, part, t) for t in (chosen, rejected)]
        of_policy = [log_probs(model, formatter, part, t) for t in (chosen, rejected)]
        of_pair = losses.dpo(*of_policy, *of_reference, beta=0.5)
        loss = losses.weighted_mean(weights[mine], of_pair)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        mean = loss.detach() / world
        distributed.all_reduce(mean)
        total.append(mean.item())
    state = {
        name: value.full_tensor() if isinstance(value, DTensor) else value
        for name, value in model.state_dict().items()
    }
    sharded = any(isinstance(value, DTensor) for value in model.state_dict().values())
    if rank == 0:
        torch.save({"losses": total, "weights": state, "sharded": sharded}, out)
    distributed.barrier()
    distributed.destroy_process_group()
    # The models still refer to the group, whose threads therefore go on.
    leave()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
