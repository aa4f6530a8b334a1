"""Conversion: to HuggingFace folders, and from the formats weights come in."""

from dsclip.convert.hf import export_hf
from dsclip.convert.hf_folder import load_hf_folder
from dsclip.convert.init import load_init

__all__ = ["export_hf", "load_hf_folder", "load_init"]
