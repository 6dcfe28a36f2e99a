"""A stand-in for an engine's process of `slidesparse bench --engine`: times are made up, and some tasks end badly.

python bench_engine.py TASK FOLDER FILE. A second process of a task is twice as fast. What it says is never published.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from tools.benchmark.engines import LOADS

task, folder, found = json.loads(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
engine, model, provider, type, pattern = task
ms = {"int8": 2.0, "fp8": 3.0, "bf16": 6.0}[type] * (1 if provider == "ours" else 1.5) * (0.5 if folder.exists() else 1)
folder.mkdir(exist_ok=True)
with open(found, "w", buffering=1) as out:
    print(json.dumps({"machine": {engine: "1.2.3"}, "bytes": 3 << 30}), file=out)
    for i, load in enumerate(LOADS):
        if (model, type, i) == ("llama3.2-1b", "bf16", 3):
            print("last words", flush=True)
            os.kill(os.getpid(), 9)
        if (model, type, i) == ("llama3.2-1b", "int8", 5):
            out.write('{"half": ')
            out.flush()
            time.sleep(600)
        if (model, provider, i) == ("llama3.2-3b", "ours", 0):
            print(json.dumps({"load": load, "blank": "OutOfMemoryError: of 1 GB"}), file=out)
        else:
            print(json.dumps({"load": load, "ms": [ms * 0.9, ms, ms * 1.2]}), file=out)
    if (model, provider) == ("llama3.2-3b", "llama3.2-3b"):
        raise SystemExit("no")
    for load in LOADS[1:]:
        print(json.dumps({"load": load, "gpu_ms": [ms / 2 if provider == "ours" else ms]}), file=out)
