"""What makes networks faster, and not different."""

import torch
from torch import nn


def store_in_bf16(network: nn.Module) -> nn.Module:
    """Keep the weights in bfloat16 that autocast would cast at each use. For a network that is not trained: under
    autocast it gives the same bits, with half of the memory and without the casts."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.to(torch.bfloat16)
    return network


def compile_blocks(network: nn.Module, dynamic: bool | None = False) -> None:
    """Have each block compiled when it is first run. Blocks of one kind share what is compiled, which takes a fraction
    of the time that the whole network takes. There is a graph for each size of a batch, unless sizes are `dynamic`
    (None: from the second one on)."""
    for blocks in network.children():
        for block in blocks if isinstance(blocks, nn.ModuleList | nn.Sequential) else ():
            block.compile(dynamic=dynamic)
