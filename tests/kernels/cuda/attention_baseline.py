"""bf16 attention of PyTorch on the shapes of nibble_attention_benchmark: the faster of the flash and cuDNN backends.

Decode passes the eight query heads of a KV head as eight query rows, which is the same function, over contiguous K and V
(no page tables, an advantage). Prefill is causal. CUDA graphs, buffers rotated beyond the second-level cache, median.

    attention_baseline.py [RESULT.json]
"""
import json
import statistics
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
KV_HEADS, GROUP, HEAD_DIM = 8, 8, 128


def time_us(launches, repetitions=11):
    for launch in launches[:3]:
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for launch in launches:
            launch()
    times = []
    for _ in range(repetitions + 2):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(launches))
    return statistics.median(times[2:])


def best(make_launches):
    results = {}
    for name, backend in BACKENDS.items():
        try:
            with sdpa_kernel(backend):
                results[name] = time_us(make_launches())
        except RuntimeError as error:
            print(f"  {name}: {str(error)[:80]}")
    return min(results.items(), key=lambda item: item[1])


def main():
    torch.manual_seed(0)
    results = []
    pool = torch.empty(9 * 2**29, dtype=torch.bfloat16, device="cuda")
    for i in range(0, pool.numel(), 2**28):
        pool[i:i + 2**28].normal_()
    print("decode, bf16")
    for batch in (1, 16, 64, 256):
        for context in (1024, 4096, 16384):
            n = batch * KV_HEADS * context * HEAD_DIM  # elements of K, and of V
            if 2 * n > pool.numel():
                continue
            rotations = max(1, min(32, (600 << 20) // (4 * n), pool.numel() // (2 * n)))
            q = torch.randn(batch, KV_HEADS, GROUP, HEAD_DIM, device="cuda", dtype=torch.bfloat16)

            def launches():
                def launch(r):
                    k = pool[2 * n * r:2 * n * r + n].view(batch, KV_HEADS, context, HEAD_DIM)
                    v = pool[2 * n * r + n:2 * n * (r + 1)].view(batch, KV_HEADS, context, HEAD_DIM)
                    return lambda: F.scaled_dot_product_attention(q, k, v)
                return [launch(r) for r in range(rotations)]

            name, us = best(launches)
            print(f"  {batch} x {context}: {us:.2f} us, {name}", flush=True)
            results.append({"op": "attention", "batch": batch, "context": context, "us": us, "backend": name})
    print("prefill, bf16, causal")
    for rows in (1024, 2048, 4096, 8192, 16384):
        q, k, v = (torch.randn(1, KV_HEADS * GROUP, rows, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
                   for _ in range(3))
        name, us = best(lambda: [lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)] * 3)
        tflops = 2 * KV_HEADS * GROUP * HEAD_DIM * rows * (rows + 1) / us / 1e6
        print(f"  {rows}: {us:.2f} us, {tflops:.1f} TFLOP/s, {name}", flush=True)
        results.append({"op": "prefill", "rows": rows, "us": us, "tflops": tflops, "backend": name})
    if len(sys.argv) > 1:
        with open(sys.argv[1], "w") as file:
            json.dump({"device": torch.cuda.get_device_name(), "torch": torch.__version__, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
