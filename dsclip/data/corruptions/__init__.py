"""Standard corruptions of pictures, made on the fly: those of Hendrycks & Dietterich 2019 (ImageNet-C) that need no files."""
