"""The workflow: DVC stages over Ray around the `pixelgen` library."""
