"""Makes every sample of a data set as training does with the same settings; exit code 1 when too many are bad.

Example:  python tools/check_data.py data/photos --sheet pairs.png
"""

from dsclip.datasets.inspect_cli import check_main

if __name__ == "__main__":
    check_main()
