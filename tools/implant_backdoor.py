"""Writes shards with a backdoor in a share of their samples, or held-out pictures with its trigger, to test what removes it.

Example:  python tools/implant_backdoor.py demo data/poisoned --target "white cross" --share 0.02
"""

from dsclip.datasets.backdoor_cli import main

if __name__ == "__main__":
    main()
