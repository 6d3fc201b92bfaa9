"""The process group of ranks that share a machine.

They meet in a file. Torch's own store, through which Ray Train lets ranks meet, listens on every interface and asks
nobody who they are. A module of its own, since it imports Ray, whose environment `pipeline.session` sets before.
"""

import os
import uuid
from pathlib import Path
from typing import Any

import ray
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _setup_torch_process_group, _TorchBackend


class LoopbackConfig(TorchConfig):
    """Ray Train's TorchConfig for the session of this machine."""

    @property
    def backend_cls(self) -> type:
        return LoopbackBackend


class LoopbackBackend(_TorchBackend):
    """Ray Train's own backend, but for the place where ranks meet."""

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        place = Path(os.environ["PIXELGEN_FORKS"]).with_name(f"ranks-{uuid.uuid4()}")  # gone with the last rank
        worker_group.execute(_set_torch_distributed_env_vars)
        ray.get([worker_group.execute_single_async(
            rank, _setup_torch_process_group, backend=backend_config.backend, world_rank=rank,
            world_size=len(worker_group), init_method=f"file://{place}", timeout_s=backend_config.timeout_s)
            for rank in range(len(worker_group))])
