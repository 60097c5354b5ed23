"""The way from an index to batches on the device: augmentation, decoding by DALI, mixing."""
