"""The command line: thin click commands over the public API, run from a checkout or installed as `slidesparse NAME`."""
