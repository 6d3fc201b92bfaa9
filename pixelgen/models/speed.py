"""What makes networks faster, and not different."""

from torch import nn


def compile_blocks(network: nn.Module, dynamic: bool | None = False) -> None:
    """Have each block compiled when it is first run. Blocks of one kind share what is compiled, which takes a fraction
    of the time that the whole network takes. There is a graph for each size of a batch, unless sizes are `dynamic`
    (None: from the second one on)."""
    for blocks in network.children():
        for block in blocks if isinstance(blocks, nn.ModuleList | nn.Sequential) else ():
            block.compile(dynamic=dynamic)
