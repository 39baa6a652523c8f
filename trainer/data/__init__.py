"""From a folder of images to batches: listing, checks, split, decoding, preprocessing and the input pipeline."""
