"""Ray as the live engine: one actor holds one machine, shards go to machines as they become free, results stream back."""
