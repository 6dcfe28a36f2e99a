"""The commands: thin click programs over the public API; installed as `slidesparse ...`."""
