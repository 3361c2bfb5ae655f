"""Conversions from and to models of other projects, a file per project."""
