"""Data sets as batches of pixels in [0, 1], with class names and prompt templates.

    data = load_data("digits", "test")
    x, y, index = data.batch(slice(0, 64))

Specs: `digits` (offline, real scans), `npz:PATH`, `folder:PATH` (a tree of class folders, or a .zip of one), `wds:PATH`
(WebDataset shards), `parquet:PATH` (Hugging Face's files), `torchvision:NAME:ROOT` (what torchvision.datasets finds on
disk), or a name of the registry, `NAME[@LAYOUT][:ROOT]`.
"""

from rvlm.data.base import Data
from rvlm.data.images import Fit
from rvlm.data.load import load_data
from rvlm.data.prompts import TEMPLATES, templates

__all__ = ["TEMPLATES", "Data", "Fit", "load_data", "templates"]
