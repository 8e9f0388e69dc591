"""Data plane: WebDataset shards on object storage in, uint8 batches of images out."""
