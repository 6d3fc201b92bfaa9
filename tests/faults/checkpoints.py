"""What a training run has saved, and whether it is what the undisturbed one has saved."""

import torch

from pixelgen.checkpoint import read_state


def checkpoints(workspace):
    """Steps of the finished checkpoints, ascending."""
    return sorted(int(p.name[5:13]) for p in workspace.path.glob("runs/train/*/checkpoints/step-*.pt.json"))


def newer(workspace, than):
    return lambda: [step for step in checkpoints(workspace) if step > than]


def same_checkpoints(workspace):
    """All have the content of the undisturbed run's; that of a requested stop may lie between two of these."""
    kept, here = ({p.name: p for p in root.glob("runs/train/*/checkpoints/step-*.pt")}
                  for root in (workspace.kept, workspace.path))
    common = kept.keys() & {f"step-{step:08}.pt" for step in checkpoints(workspace)}
    assert len(common) >= len(checkpoints(workspace)) - 1
    for name in common:
        assert content(read_state(here[name])) == content(read_state(kept[name])), name
    return "every checkpoint"


def content(value):
    """What can be compared of a training state: the file's bytes also tell which of its strings are one object."""
    if isinstance(value, dict):
        return {key: content(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [content(v) for v in value]
    return value.numpy().tobytes() if isinstance(value, torch.Tensor) else value


def rank_0(workspace):
    """Its process id; None where one is just taking over."""
    noted = (workspace.run_directory("train") / "writer.lease").read_text().split()
    return int(noted[0]) if noted else None


def newest(workspace):
    return max(checkpoints(workspace), default=0)
