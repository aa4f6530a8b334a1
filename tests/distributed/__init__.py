"""Tests that run on several real ranks."""
