"""Frozen networks that turn images and text into features, each loaded from local files."""

INCEPTION = "inception-v3-compat"  # the name of figures by FID's network, with its published weights
