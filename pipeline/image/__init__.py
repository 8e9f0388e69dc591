"""One image: bytes to pixels, pixels to the size of the model. Knows no shard and no store."""
