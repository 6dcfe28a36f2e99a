"""The accuracy table of docs/accuracy.md.

texts          token ids of the texts, from packages that the user downloaded
store          what was measured, one JSON file that several processes may add to
models         the dense model, its pruned weights, and sparse copies of it
points         the table's points: pattern, method, scheme
sensitivity    what each linear layer costs, and patterns chosen a layer
encoder        the same for a sentence encoder
page           tables and picture of what was measured
"""
