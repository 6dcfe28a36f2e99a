"""One process of `slidesparse bench --engine`: python -m ...serve TASK FOLDER FILE.

Weights are random, and packed on the GPU. Findings are written as they come, a line of JSON each: times first, since a profiler
that was once at work may slow what follows; then the GPU's.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import slidesparse_nb as ss

from .cases import GEOMETRIES, KINDS, OURS, told
from .engines import LOADS, STEPS, Load, Task

DEVICE = "cuda"
PREFILLS, DECODES = 5, 3
"""How often each is timed."""

STARTED = 16
"""Outputs of the shorter of two runs: by then the prefills of all requests are done, and the difference is decoding alone."""

PROFILED = 16
"""Steps of decoding that are profiled."""

LONGEST, TOKENS = 4096, 16384
"""Tokens of a request, and of one step of vLLM, at most."""

MEMORY = 0.85
"""Share of the GPU's memory for vLLM; the bench itself and the CUDA context take some."""

FILLED = "process_weights_after_loading"
Generate = Callable[[list[list[int]], int], Any]


def write_config(task: Task, folder: Path) -> None:
    """config.json of the model, which both engines read."""
    of = GEOMETRIES[task.model]
    assert of.family is not None
    config = {
        "architectures": [f"{of.family.capitalize()}ForCausalLM"], "model_type": of.family, "hidden_size": of.hidden,
        "intermediate_size": of.inner, "num_hidden_layers": of.layers, "num_attention_heads": of.heads,
        "num_key_value_heads": of.kv_heads, "head_dim": of.head, "vocab_size": of.vocab, "tie_word_embeddings": of.tied,
        "max_position_embeddings": 2 * LONGEST, "rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 1e6,
        "torch_dtype": KINDS[task.type].activations, "bos_token_id": 1, "eos_token_id": 2, "use_sliding_window": False,
    }  # fmt: skip
    if task.engine == "vllm" and task.pattern is not None:
        config["quantization_config"] = ss.PackedConfig.of(task.pattern, KINDS[task.type].name, ("lm_head",)).written()
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))


def vllm(task: Task, folder: Path) -> tuple[Any, Generate]:
    """The model, and what generates so many tokens of each prompt."""
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_HOST_IP="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    for name, value in (("VLLM_NO_USAGE_STATS", "1"), ("HF_HUB_OFFLINE", "1"), ("VLLM_LOGGING_LEVEL", "ERROR")):
        os.environ.setdefault(name, value)
    engine: Any = importlib.import_module("vllm")
    if task.provider == OURS:
        importlib.import_module("slidesparse_nb.integrations.vllm").register()
        _fill_packed_layers()
    llm = engine.LLM(
        model=str(folder), skip_tokenizer_init=True, dtype="bfloat16", load_format="dummy",
        quantization="fp8" if (task.provider, task.type) == ("vllm", "fp8") else None, max_model_len=LONGEST,
        gpu_memory_utilization=MEMORY, max_num_seqs=256, max_num_batched_tokens=TOKENS, seed=0, disable_log_stats=True,
        enable_prefix_caching=False,
    )  # fmt: skip

    def generate(prompts: list[list[int]], outputs: int) -> Any:
        sampling = engine.SamplingParams(temperature=0.0, max_tokens=outputs, ignore_eos=True, detokenize=False)
        return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)

    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.model, generate


def _fill_packed_layers() -> None:
    """Pack random weights into each layer of the plugin before it arranges what was loaded: nothing was."""
    torch: Any = importlib.import_module("torch")
    cupy: Any = importlib.import_module("cupy")
    method = importlib.import_module("slidesparse_nb.integrations.vllm.method").SlideSparseMethod
    as_cupy = importlib.import_module("slidesparse_nb.integrations.tensors").as_cupy
    arrange = getattr(method, FILLED)

    def fill(self: Any, layer: Any) -> None:
        if hasattr(layer, "weight_packed"):
            n, k = layer.slidesparse_shape
            w = torch.randn(n, k, device=DEVICE, dtype=torch.bfloat16) / k**0.5
            torch.cuda.synchronize()  # CuPy's stream is another
            packed = ss.pack(as_cupy(w), self.packed.pattern, self.packed.scheme, prune="magnitude")
            layer.weight_shape.data.copy_(torch.tensor([n, layer.slidesparse_whole_k]))
            for name, array in packed.tensors().items():
                if name != "weight_shape":
                    as_cupy(getattr(layer, name).data.view(torch.uint8))[...] = array.view("u1")
            cupy.cuda.Device().synchronize()
            del w, packed
            arrange(self, layer)
            cupy.get_default_memory_pool().free_all_blocks()
            torch.cuda.empty_cache()

    setattr(method, FILLED, fill)


def transformers(task: Task, folder: Path) -> tuple[Any, Generate]:
    """The model, and its `generate` as a user calls it: eager, with the default cache."""
    torch: Any = importlib.import_module("torch")
    library: Any = importlib.import_module("transformers")
    torch.manual_seed(0)
    with torch.device(DEVICE):
        config = library.AutoConfig.from_pretrained(folder)
        model = library.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None
    if task.provider == OURS:
        sparse = importlib.import_module("slidesparse_nb.integrations.torch").SparseLinear
        for name, layer in [*model.named_modules()]:
            if isinstance(layer, torch.nn.Linear) and name != "lm_head":
                made = sparse.from_linear(layer, task.pattern, KINDS[task.type].name)
                made.drop_packed()
                model.set_submodule(name, made)

    def generate(prompts: list[list[int]], outputs: int) -> Any:
        ids = torch.tensor(prompts, device=DEVICE)
        options = {"max_new_tokens": outputs, "do_sample": False, "pad_token_id": 0}
        return model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    return model, generate


def size(model: Any) -> int:
    """Bytes of the model's tensors."""
    arranged = [tensor for module in model.modules() for tensor in getattr(module, "arranged", ())]
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers(), *arranged))


def timed(run: Callable[[int], None], load: Load) -> list[float]:
    """Milliseconds by the host's clock of a prefill, or of a step: the longer run without the shorter."""

    def once(outputs: int) -> float:
        began = time.perf_counter()
        run(outputs)
        return (time.perf_counter() - began) * 1e3

    run(2)  # compiles, allocates
    if load.phase == "prefill":
        return [once(1) for _ in range(PREFILLS)]
    found = [(once(STARTED + STEPS) - once(STARTED)) / STEPS for _ in range(DECODES)]
    if min(found) <= 0:
        raise RuntimeError(f"{STEPS} more steps took no longer than none: the host is too busy to be timed")
    return found


def busy(run: Callable[[int], None], load: Load) -> list[float]:
    """Milliseconds of the same in which the GPU ran kernels or copies; none if no profile can be made."""
    torch: Any = importlib.import_module("torch")

    def once(outputs: int) -> float:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run(outputs)
        own = [
            event
            for event in profile.events()
            if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False)
        ]
        return covered([(event.time_range.start, event.time_range.end) for event in own]) * 1e-3

    ms = once(1) if load.phase == "prefill" else (once(STARTED + PROFILED) - once(STARTED)) / PROFILED
    return [ms] if ms > 0 else []


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of spans (start, end): kernels overlap."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def measure(task: Task, folder: Path, tell: Callable[..., None]) -> None:
    """Bring the engine up, then time each load, then profile each."""
    os.environ.update(TEARDOWN_CUPTI="0", DISABLE_CUPTI_LAZY_REINIT="1")  # as PyTorch advises beside CUDA graphs
    write_config(task, folder)
    model, generate = {"vllm": vllm, "transformers": transformers}[task.engine](task, folder)
    torch: Any = importlib.import_module("torch")
    versions = {name: str(importlib.import_module(name).__version__) for name in ("torch", task.engine)}
    tell(machine=versions, bytes=size(model))
    drawn = torch.Generator().manual_seed(0)

    def run(prompts: list[list[int]], outputs: int) -> None:
        generate(prompts, outputs)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    failed = set()
    for name, of in (("ms", timed), ("gpu_ms", busy)):
        for load in LOADS:
            prompts = torch.randint(3, 30000, (load.batch, load.prompt), generator=drawn).tolist()
            try:
                if load not in failed:
                    tell(load=load, **{name: of(partial(run, prompts), load)})
            except Exception as error:  # out of memory: the next may work
                failed.add(load)
                tell(load=load, blank=told(error))


def main(task: str, folder: str, found: str) -> None:
    with open(found, "w", buffering=1, encoding="utf-8") as out:

        def tell(**facts: Any) -> None:
            out.write(json.dumps(facts) + "\n")

        try:
            measure(Task(*json.loads(task)), Path(folder), tell)
        except Exception as error:
            tell(failed=told(error))
            raise


if __name__ == "__main__":
    main(*sys.argv[1:])
    os._exit(0)  # an engine's own end takes seconds
