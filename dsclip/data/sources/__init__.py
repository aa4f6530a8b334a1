"""Bytes, wherever they are: storage, http, copies of remote files."""
