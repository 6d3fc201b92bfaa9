"""What makes networks faster or smaller, and not different."""

import functools

from torch import nn
from torch.utils.checkpoint import checkpoint


def compile_blocks(network: nn.Module, dynamic: bool | None = False) -> None:
    """Have each block compiled when it is first run. Blocks of one kind share what is compiled, which takes a fraction
    of the time that the whole network takes. There is a graph for each size of a batch, unless sizes are `dynamic`
    (None: from the second one on)."""
    for blocks in network.children():
        for block in blocks if isinstance(blocks, nn.ModuleList | nn.Sequential) else ():
            block.compile(dynamic=dynamic)


def recompute_blocks(network: nn.Module, count: int) -> None:
    """Have the first `count` of the network's blocks keep for the backward pass only what enters them, and compute the
    rest again there (arXiv 1604.06174): less memory for a third more work. To be called before `compile_blocks`."""
    blocks = network.blocks
    assert isinstance(blocks, nn.ModuleList)
    for block in blocks[:count]:  # masks of dropout are arguments: there is no random state to keep
        forward = functools.partial(type(block).forward, block)
        block.forward = functools.partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)
