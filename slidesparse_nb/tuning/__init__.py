"""The search for the fastest candidate of a product, by timing all of them on this GPU."""
