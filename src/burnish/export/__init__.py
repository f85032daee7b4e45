"""Adapter files: key names of other programs, metadata, reading back and verifying."""
