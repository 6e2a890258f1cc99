"""Foreign formats to shards and back: `samtrain data convert`."""
