"""Frozen networks that turn images and text into features, each loaded from local files."""
