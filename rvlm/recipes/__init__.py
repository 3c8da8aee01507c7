"""Bundled recipes: `rvlm train --config digits/tecoa`."""
