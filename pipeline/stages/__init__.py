"""The stages of the workflow, one module each: `python -m pipeline.stages.STAGE [NAME]` in the top folder."""
