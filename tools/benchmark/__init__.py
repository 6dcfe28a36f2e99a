"""The parts of `slidesparse bench`.

selection  what is measured, in which order        results   cells, and the JSON they are kept in
run        the loop: check, time, record           floors    the least time that bytes and operations take
ours       this library, through its public API    summary   medians, spreads, ratios, crossovers, cliffs
torch_peers  cuBLASLt and cuSPARSELt by PyTorch    table, readme, picture, curve, style   what a reader sees
gpu, sensors  CuPy: operands, graphs, clocks, watts
check      results against the reference           keeper, rules   their file while a run lasts; what it must hold
"""
