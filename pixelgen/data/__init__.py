"""From shards to batches: the files (`shards`), the order in which training sees their rows (`order`), how a caption
becomes a prompt (`captions`), and the reading ahead of it all (`feed`). Needs the extra `train`."""
