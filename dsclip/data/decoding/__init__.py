"""From a sample's bytes to what a batch is made of: images, tokens, augmentation."""
