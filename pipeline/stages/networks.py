"""networks: the frozen networks, put into files once, a folder each; no later stage touches the web."""

import torch

from pipeline import session
from pipeline.stage import Stage
from pipeline.storage import fresh_directory


def run(stage: Stage) -> None:
    torch.set_num_threads(1)  # the same stand-ins on every machine
    if stage.cluster.address is None:
        session.begin()
    out = fresh_directory(stage.out)
    for role in stage.own:
        (out / role).mkdir()
    made = {role: network.meaning | network.make(out / role) for role, network in stage.own.items()}
    stage.storage.publish(out, "networks", stage.own, made=made)
