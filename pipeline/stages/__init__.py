"""The stages of the workflow, one module each, in which `run` does the work: `python -m pipeline STAGE [KEY]`."""
