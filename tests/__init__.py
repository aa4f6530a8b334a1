"""Tests of dsclip, one file a stage."""
