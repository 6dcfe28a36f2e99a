"""The parts of `slidesparse bench`.

cases    types, models, shapes, and the order in which cases are measured
ours     this library as a provider of calls        peers    the baselines it is compared with
measure  the GPU, its clock and sensors; the loop    check    results against the reference
results  cells and their JSON file; floors           show     tables, sentences, README; picture
engines  whole models in an engine                  processes  the loop over them
serve    one process of it, with the engine          served   their tables
"""
