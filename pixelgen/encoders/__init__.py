"""Frozen networks that turn images and text into features, each loaded from local files. Importing this is light."""

INCEPTION = "inception-v3-compat"  # the name of figures by FID's network, with its published weights
# Those that terms of the objective look through, by role: "module:function" that loads one from its folder for a
# denoiser with so many patches on a side. What it gives is an nn.Module with three more methods: `compiled`, `example`
# and `kept` (see `pixelgen.encoders.dino`).
PERCEPTUAL = {"dino": "pixelgen.encoders.dino:load_dino", "lpips": "pixelgen.encoders.lpips:load_lpips"}
