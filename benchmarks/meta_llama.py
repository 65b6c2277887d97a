"""Time and memory to trace and analyse a language model of 70 billion parameters that has no data.

The model has the shape of Llama 3 70B (80 layers, width 8192, 64 heads over 8 groups of keys) and lies on the meta
device, so neither building nor capturing it takes memory for weights. Peak memory is the resident set of the whole
process, imports included. Needs ``pip install transformers``.

Run: python benchmarks/meta_llama.py [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import torch
import transformers

import chase_fx


def main() -> None:
    """Measure, print, write the numbers beside this file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    config = transformers.LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config).eval()
        tokens = torch.zeros(1, 16, dtype=torch.long)
    start, cpu = time.perf_counter(), time.process_time()
    traced = chase_fx.trace(model, (), {"input_ids": tokens})
    captured = time.perf_counter()
    channels = chase_fx.analyze(traced, outputs="logits")
    end, cpu = time.perf_counter(), time.process_time() - cpu
    result = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": options.threads,
        "parameters": sum(p.numel() for p in model.parameters()),
        "groups": len(channels.groups),
        "trace_seconds": captured - start,
        "analyze_seconds": end - captured,
        "cpu_seconds": cpu,
        "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    for name, value in result.items():
        print(f"{name:16} {value:.2f}" if isinstance(value, float) else f"{name:16} {value}")
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
