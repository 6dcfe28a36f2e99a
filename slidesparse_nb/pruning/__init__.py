"""Prune a dense checkpoint to a (2N-2):2N pattern, with what is known of the activations: a stage of its own, before packing.

groups         which weights of a group stay, by their scores
wanda          |w| times the norm of its input column
sparsegpt      second-order: the weights that stay make up for those that go, and for their own quantization
refine         a better mask and better weights than SparseGPT's, from these
together       layers that read the same tensor, pruned as one matrix
statistics     column norms and Hessians of calibration data, and their file

scores         rows pruned by magnitude, or by scores and masks of a file
model          a model of transformers, block by block, and what its layers read
options        what to prune and how, and what came of it
parts          finished blocks of a run that may be killed
run            the order of steps

The mathematics take NumPy or CuPy arrays and import neither PyTorch nor CuPy.
"""
