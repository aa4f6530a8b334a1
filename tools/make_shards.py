"""Writes webdataset shards from images with captions or classes.

On a laptop:   python tools/make_shards.py photos.zip data/photos
On a cluster:  run it once, on the file system that all nodes share.
"""

from dsclip.datasets.cli import main

if __name__ == "__main__":
    main()
