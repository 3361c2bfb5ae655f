"""Conversions from and to other projects' models, a file a project."""
