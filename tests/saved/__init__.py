"""Artefacts as they were saved once: `python -m tests.saved` writes those of today's format."""
