"""Writes docs/reference.md, every key of a recipe, from the fields of its sections.

On a laptop or anywhere:   python tools/make_reference.py
"""

from dsclip.config.reference import main

if __name__ == "__main__":
    main()
