"""The commands of ``python -m jaxaccel``: what they find out, and how they say it."""
