"""Folders of files as people have them, read beside a catalog."""
