#!/usr/bin/env python3
"""Measures what each idea of the quantizer is worth and writes the tables of docs/accuracy.md.

  tools/accuracy/ablate.py --bin build/release/bin validate    settings, on a slice cut from the calibration books
  tools/accuracy/ablate.py --bin build/release/bin final       the chosen ones, on the held-out text, once
  tools/accuracy/ablate.py --bin build/release/bin write       docs/accuracy.md from the results that are there

Every row is one call of nibble-quantize and one of nibble-eval on the bundled model and on its outlier twin. Results are kept
under --work by what they depend on (model, settings, text), so an interrupted run goes on where it was; after the programs changed,
--fresh measures again.
"""

import argparse
import concurrent.futures
import dataclasses
import hashlib
import json
import pathlib
import re
import shutil
import struct
import subprocess
import sys
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODEL = ROOT / "deploy/models/novelist-17m"
CALIBRATION = ROOT / "deploy/models/text/calibration.txt"
HELDOUT = ROOT / "deploy/models/text/heldout.txt"
PAGE = ROOT / "docs/accuracy.md"
RESULTS = ROOT / "tools/accuracy/results.json"
WINDOW = 512
VALIDATION_SHARE = 0.3  # of the calibration text, its end; statistics are then taken from the rest
# Characters cut from the front of the calibration text: windows are spread evenly over it, so every sample reads others.
SAMPLE_CUTS = {"a": 0, "b": 8000, "c": 16000}

# What the rows about a single setting try, besides the value that `best` has.
ALTERNATIVES = {
    "rotate-residual": ["off", "hadamard", "principal"],
    "rotate-heads": ["off", "on"],
    "rotate-down": ["off", "on"],
    "sort-neurons": ["off", "on"],
    "smooth-attention": ["0", "0.5"],
    "smooth-output": ["0", "0.3"],
    "clip-search": ["off", "on"],
    "gptq": ["off"],
    "gptq-order": ["stored", "within-group", "by-group", "all"],
    "refinements": ["0", "2"],
    "coded-inputs": ["off", "on"],
    "quantized-flow": ["off", "on"],
    "permute": ["off", "magnitude", "energy"],
    "eight-bit-share": ["0", "0.17", "0.25"],
}
ACTIVATION_SETTINGS = ("permute", "eight-bit-share")  # of w4a4kv4 alone

FMPQ = {"permute": "magnitude", "eight-bit-share": "0.17", "clip-search": "on"}
QOQ = {"rotate-residual": "hadamard", "smooth-attention": "0.5", "smooth-output": "0.3", "clip-search": "on"}
QUAROT = {"rotate-residual": "hadamard", "rotate-heads": "on", "rotate-down": "on", "smooth-attention": "0.5", "gptq": "on"}


@dataclasses.dataclass(frozen=True)
class Row:
    name: str
    mode: str
    preset: str = "none"
    settings: tuple = ()  # of (name, value)
    per_token: bool = False
    sample: str = "a"
    group: str = "methods"  # the table it stands in

    def quantize_options(self):
        options = ["--mode", self.mode, "--preset", self.preset]
        for name, value in self.settings:
            options += ["--set", f"{name}={value}"]
        return options


def row(name, mode, preset="none", settings=None, **other):
    return Row(name, mode, preset, tuple(sorted((settings or {}).items())), **other)


def method_rows():
    rows = []
    for mode in ("w4a4kv4", "w4a8kv4"):
        rows.append(row("round to nearest", mode))
        if mode == "w4a4kv4":
            rows.append(row("round to nearest, one activation scale per token", mode, per_token=True))
            rows.append(row("FMPQ alone", mode, settings=FMPQ))
        rows.append(row("QoQ alone", mode, settings=QOQ))
        if mode == "w4a4kv4":
            rows.append(row("FMPQ and QoQ", mode, settings={**QOQ, **FMPQ}))
            rows.append(row("QuaRot: rotations, GPTQ, one activation scale per token", mode, settings=QUAROT, per_token=True))
        rows.append(row("round to nearest, SmoothAttention", mode, settings={"smooth-attention": "0.5"}))
        for preset in ("fast", "balanced", "best"):
            rows.append(row(f"`{preset}`", mode, preset))
        rows.append(row("`best`, one activation scale per token", mode, "best", per_token=True) if mode == "w4a4kv4"
                    else row("`best` without SmoothAttention", mode, "best", {"smooth-attention": "0"}))
    return rows


def setting_rows(best, modes=("w4a4kv4", "w4a8kv4")):
    rows = []
    for mode in modes:
        for name, values in ALTERNATIVES.items():
            if name not in best or (mode == "w4a8kv4" and name == "eight-bit-share"):
                continue
            for value in values:
                if not same_value(value, best[name]):
                    rows.append(row(f"{name}={value} (best: {best[name]})", mode, "best", {name: value}, group="settings"))
    return rows


def spread_rows():
    rows = []
    for sample in SAMPLE_CUTS:
        for mode in ("w4a4kv4", "w4a8kv4"):
            rows.append(row("`best`", mode, "best", sample=sample, group="spread"))
        rows.append(row("FMPQ alone", "w4a4kv4", settings=FMPQ, sample=sample, group="spread"))
        rows.append(row("QoQ alone", "w4a8kv4", settings=QOQ, sample=sample, group="spread"))
    return rows


def same_value(a, b):
    try:
        return float(a) == float(b)
    except ValueError:
        return a == b


def eight_bit_shares(directory):
    """(share over all inputs, largest share of one input), from the block_bits of a quantized checkpoint."""
    shares, eight, blocks = [], 0, 0
    for path in sorted(directory.glob("*.safetensors")):
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
            for name, tensor in header.items():
                # One of the linears that share an input speaks for it.
                if not re.search(r"(q_proj|o_proj|gate_proj|down_proj)\.block_bits$", name):
                    continue
                begin, end = tensor["data_offsets"]
                file.seek(8 + length + begin)
                bits = file.read(end - begin)
                shares.append(bits.count(8) / len(bits))
                eight, blocks = eight + bits.count(8), blocks + len(bits)
    return eight / max(1, blocks), max(shares, default=0)


class Runner:
    def __init__(self, args):
        self.bin, self.work, self.args = pathlib.Path(args.bin), pathlib.Path(args.work), args
        self.started = time.time()
        self.lock = threading.Lock()
        self.work.mkdir(parents=True, exist_ok=True)
        self.models = {"novelist-17m": MODEL, "outlier twin": self.twin()}

    @staticmethod
    def hash_files(paths):
        digest = hashlib.sha256()
        for path in paths:
            digest.update(pathlib.Path(path).read_bytes())
        return digest.hexdigest()[:16]

    def run(self, program, *options):
        command = [str(self.bin / program), *map(str, options)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
        return done.stdout

    def twin(self):
        directory = self.work / "twin"
        if not (directory / "config.json").exists():
            self.run("nibble-outlier-twin", "--model", MODEL, "--output", directory)
        return directory

    def best_settings(self):
        out = self.run("nibble-quantize", "--preset", "best", "--settings")
        return dict(line.split()[:2] for line in out.splitlines() if line.strip())

    def text(self, stage, use, sample="a"):
        """The calibration or evaluation text of a stage, as a file."""
        if stage == "final" and use == "evaluate":
            return HELDOUT
        text = CALIBRATION.read_text()
        cut = text.rfind("\n\n", 0, int(len(text) * (1 - VALIDATION_SHARE)))
        if stage == "validate":
            text = text[:cut] if use == "calibrate" else text[cut:]
        if use == "calibrate":
            text = text[SAMPLE_CUTS[sample]:]
        path = self.work / f"{stage}-{use}-{sample}.txt"
        with self.lock:
            if not path.exists():
                path.write_text(text)
        return path

    def windows(self, stage):
        return self.args.windows or (40 if stage == "validate" else 240)

    def cached(self, what, measure):
        key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:20]
        path = self.work / f"{key}.json"
        if path.exists() and (not self.args.fresh or path.stat().st_mtime > self.started):
            return json.loads(path.read_text())["result"]
        result = measure()
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"what": what, "result": result}, indent=1))
        partial.rename(path)
        return result

    def evaluate(self, directory, stage, *options):
        return json.loads(self.run("nibble-eval", "--model", directory, "--text", self.text(stage, "evaluate"), "--window",
                                   WINDOW, "--max-windows", self.windows(stage), "--threads", self.args.threads, "--json",
                                   *options))

    def float_perplexity(self, model, stage):
        what = {"float": model, "stage": stage, "windows": self.windows(stage),
                "texts": self.hash_files([self.text(stage, "evaluate")])}
        return self.cached(what, lambda: self.evaluate(self.models[model], stage)["perplexity"])

    def measure(self, model, row, stage):
        what = {"row": dataclasses.asdict(dataclasses.replace(row, name="", group="")), "model": model, "stage": stage,
                "windows": self.windows(stage),
                "best": self.best_settings() if row.preset != "none" else None,
                "texts": self.hash_files([self.text(stage, "calibrate", row.sample), self.text(stage, "evaluate")])}

        def quantize_and_evaluate():
            directory = self.work / f"quantized-{threading.get_ident()}"
            start = time.monotonic()
            self.run("nibble-quantize", "--model", self.models[model], "--output", directory, "--calibration",
                     self.text(stage, "calibrate", row.sample), "--force", "--threads", self.args.threads,
                     *row.quantize_options())
            seconds = time.monotonic() - start
            result = self.evaluate(directory, stage, *(["--per-token-activations"] if row.per_token else []))
            share, largest = eight_bit_shares(directory)
            shutil.rmtree(directory)
            return {"perplexity": result["perplexity"], "tokens": result["tokens"], "quantize_seconds": seconds,
                    "eight_bit_share": share, "largest_eight_bit_share": largest}

        return self.cached(what, quantize_and_evaluate)


def collect(runner, rows, stage):
    results = []
    start = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(runner.args.jobs) as pool:  # each waits for a process of its own
        ahead = [pool.submit(runner.float_perplexity, model, stage) for model in runner.models]
        distinct = dict.fromkeys(dataclasses.replace(row_, name="", group="") for row_ in rows)
        ahead += [pool.submit(runner.measure, model, row_, stage) for row_ in distinct for model in runner.models]
        for done, future in enumerate(concurrent.futures.as_completed(ahead), 1):
            future.result()
            elapsed = time.monotonic() - start
            print(f"\r[{done}/{len(ahead)}  {elapsed:.0f} s, {elapsed / done * (len(ahead) - done):.0f} s left]", end="",
                  file=sys.stderr, flush=True)
    for row_ in rows:
        entry = {**dataclasses.asdict(row_), "stage": stage, "ratio": {}, "perplexity": {}}
        for model in runner.models:
            base = runner.float_perplexity(model, stage)
            result = runner.measure(model, row_, stage)
            entry["perplexity"][model] = result["perplexity"]
            entry["ratio"][model] = result["perplexity"] / base
            entry.setdefault("eight_bit_share", {})[model] = result["eight_bit_share"]
            entry.setdefault("largest_eight_bit_share", {})[model] = result["largest_eight_bit_share"]
            entry.setdefault("quantize_seconds", {})[model] = round(result["quantize_seconds"], 1)
            entry["tokens"] = result["tokens"]
        results.append(entry)
        ratios = "  ".join(f"{model} {ratio:.4f}" for model, ratio in entry["ratio"].items())
        print(f"{row_.mode}  {row_.name}  sample {row_.sample}  {ratios}")
    return results


def table(results, models):
    lines = ["| configuration | " + " | ".join(f"{m}: perplexity | ratio" for m in models) + " |",
             "| --- | " + " | ".join("---: | ---:" for _ in models) + " |"]
    for entry in results:
        cells = " | ".join(f"{entry['perplexity'][m]:.3f} | {entry['ratio'][m]:.4f}" for m in models)
        lines.append(f"| {entry['name']} | {cells} |")
    return "\n".join(lines)


def tables(results, models, floats):
    """name -> markdown, for the markers of the page."""
    out = {}
    for stage in ("validate", "final"):
        for group in ("methods", "settings"):
            for mode in ("w4a4kv4", "w4a8kv4"):
                chosen = [r for r in results if (r["stage"], r["group"], r["mode"]) == (stage, group, mode)]
                if group == "settings":
                    best = [r for r in results if (r["stage"], r["mode"], r["name"], r["sample"]) == (stage, mode, "`best`", "a")]
                    chosen = best[:1] + sorted(chosen, key=lambda r: sum(r["ratio"].values())) if chosen else []
                elif chosen:
                    chosen.insert(0, {"name": "float", "perplexity": floats[stage], "ratio": {m: 1 for m in models}})
                if chosen:
                    out[f"{stage} {group} {mode}"] = table(chosen, models)
    for stage in ("validate", "final"):
        spread = [r for r in results if (r["stage"], r["group"]) == (stage, "spread")]
        if not spread:
            continue
        lines = ["| configuration | mode | model | sample a | b | c | mean | spread |", "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |"]
        for name, mode in dict.fromkeys((r["name"], r["mode"]) for r in sorted(spread, key=lambda r: r["mode"])):
            for model in models:
                ratios = [r["ratio"][model] for r in spread if (r["name"], r["mode"]) == (name, mode)]
                cells = " | ".join(f"{x:.4f}" for x in ratios)
                mean = sum(ratios) / len(ratios)
                lines.append(f"| {name} | {mode} | {model} | {cells} | {mean:.4f} | {max(ratios) - min(ratios):.4f} |")
        out[f"{stage} spread"] = "\n".join(lines)
    shares = [r for r in results if r["name"] == "`best`" and r["mode"] == "w4a4kv4" and r["sample"] == "a"]
    if shares:
        r = shares[-1]
        out["share"] = "\n".join(["| model | 8-bit blocks | largest share of one input |", "| --- | ---: | ---: |"] +
                                 [f"| {m} | {100 * r['eight_bit_share'][m]:.1f} % | {100 * r['largest_eight_bit_share'][m]:.1f} % |"
                                  for m in models])
    return out


def write_page(results, models, floats):
    page = PAGE.read_text()
    for name, text in tables(results, models, floats).items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        if begin in page and end in page:
            head, rest = page.split(begin, 1)
            page = f"{head}{begin}\n{text}\n{end}{rest.split(end, 1)[1]}"
    PAGE.write_text(page)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=["validate", "final", "write"])
    parser.add_argument("--bin", default=ROOT / "build/release/bin")
    parser.add_argument("--work", default=ROOT / "build/ablation", help="results so far, and scratch")
    parser.add_argument("--windows", type=int, help=f"windows of {WINDOW} tokens (validate: 40, final: 240)")
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time")
    parser.add_argument("--threads", type=int, default=2, help="threads of each")
    parser.add_argument("--fresh", action="store_true", help="measure again what was measured before")
    parser.add_argument("--only", default="", help="regular expression on 'group mode name sample': measure these rows only")
    args = parser.parse_args()
    saved = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"float": {}, "rows": []}
    if args.stage != "write":
        runner = Runner(args)
        rows = method_rows() + spread_rows() + setting_rows(runner.best_settings())
        rows = [r for r in rows if re.search(args.only, f"{r.group} {r.mode} {r.name} {r.sample}")]
        new = collect(runner, rows, args.stage)
        saved["float"][args.stage] = {m: runner.float_perplexity(m, args.stage) for m in runner.models}
        def identity(r):
            return (r["stage"], r["group"], r["mode"], r["name"], r["sample"])
        fresh = {identity(r) for r in new}
        saved["rows"] = [r for r in saved["rows"] if identity(r) not in fresh] + new
        RESULTS.write_text(json.dumps(saved, indent=1) + "\n")
    if PAGE.exists():
        write_page(saved["rows"], ["novelist-17m", "outlier twin"], saved["float"])


if __name__ == "__main__":
    main()
