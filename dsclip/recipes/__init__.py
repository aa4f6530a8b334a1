"""Recipes that come with dsclip."""
