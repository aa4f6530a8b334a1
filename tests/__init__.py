"""Tests of dsclip, one file a module."""
