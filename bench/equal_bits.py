"""Show that the results of two checkouts are equal to the bit: for a change that leaves every number as it is.

    python bench/equal_bits.py --out before.json                   # in the environment of one checkout
    python bench/equal_bits.py --out after.json                    # in that of the other, on the same machine
    python bench/equal_bits.py --compare before.json after.json    # exit status 1 if anything differs

Small calls of the public functions, forward and every gradient, on each backend that takes them, Triton's kernels in
its interpreter. What each returns is kept as a digest of dtype, shape and bytes under "call/backend/output"; a call
that a backend refuses leaves no entry, so that --compare shows a refusal that came or went as missing or extra.

Only names of `fusemesh` itself are used, because the modules below them may move. Digests hold for one processor and
one version of torch and triton: take both files on the same machine. FUSEMESH_CPU_ISA chooses the engine's instruction
set (`--only /cpu/` is then enough); everything else that could change bits is set below.
"""

from __future__ import annotations

import os

# Before torch, triton and numpy are imported: kernels in the interpreter, one thread everywhere, no default backend.
os.environ["TRITON_INTERPRET"] = "1"
os.environ["FUSEMESH_BACKEND"] = "auto"
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import argparse
import hashlib
import json
import sys
import time
import traceback
import warnings
from pathlib import Path

# Run as a script, Python looks beside this file; the imports start at the clone's root.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])


import torch
from torch import Tensor

import fusemesh
from bench.bits.decode import add_decode
from bench.bits.dense import add_dense
from bench.bits.draw import CALLS, Draw
from bench.bits.linear import add_linear
from bench.bits.modules import add_modules
from bench.bits.packed import add_packed


def digest(x: Tensor) -> str:
    """Return the SHA-256 of dtype, shape and bytes."""
    data = x.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(f"{x.dtype} {tuple(x.shape)} ".encode() + data.numpy().tobytes()).hexdigest()


def run_all(only: str, verbose: bool) -> tuple[dict[str, str], int]:
    """Return the digests of every call whose "call/backend" holds ``only``, and how many calls failed."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    warnings.simplefilter("ignore")
    entries: dict[str, str] = {}
    calls = refusals = failures = 0
    beginning = time.perf_counter()
    for name, call in CALLS.items():
        asked = [backend for backend in call.backends if only in f"{name}/{backend}/"]
        calls += bool(asked)
        for backend in asked:
            start = time.perf_counter()
            try:
                outputs = call.run(Draw(name), backend)
            except Exception as error:
                # Every call is one that these two take.
                if isinstance(error, (ValueError, NotImplementedError)) and backend not in ("reference", "auto"):
                    refusals += 1
                    if verbose:
                        print(f"{name}/{backend}: refused: {error}", file=sys.stderr)
                else:
                    failures += 1
                    traceback.print_exc()
                    print(f"{name}/{backend}: FAILED", file=sys.stderr)
                continue
            entries.update({f"{name}/{backend}/{output}": digest(x) for output, x in outputs.items()})
            if verbose:
                print(f"{name}/{backend}: {time.perf_counter() - start:.2f} s", file=sys.stderr)
    seconds = time.perf_counter() - beginning
    print(
        f"{fusemesh.__file__}: {calls} calls, {len(entries)} entries, {refusals} refusals, {failures} failures, "
        f"{seconds:.0f} s",
        file=sys.stderr,
    )
    return entries, failures


def compare(before: Path, after: Path, only: str) -> int:
    """Print how far two files agree; return how many entries differ."""
    a, b = (
        {name: value for name, value in json.loads(path.read_text()).items() if only in name}
        for path in (before, after)
    )
    equal = sum(a[name] == b[name] for name in a.keys() & b.keys())
    differences = 0
    for name in sorted(a.keys() | b.keys()):
        if a.get(name) != b.get(name):
            differences += 1
            print(f"{'missing' if name not in b else 'extra' if name not in a else 'differing'}: {name}")
    print(f"{equal} equal, {differences} not")
    return differences


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write digests there; default: to standard output")
    parser.add_argument("--compare", type=Path, nargs=2, metavar=("A", "B"), help="compare two files, run nothing")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="only calls whose call/backend/ holds it")
    parser.add_argument("--verbose", action="store_true", help="print each call's time, and each refusal")
    options = parser.parse_args()
    if options.compare:
        before, after = options.compare
        return 1 if compare(before, after, options.only) else 0
    entries, failures = run_all(options.only, options.verbose)
    text = json.dumps(entries, indent=0, sort_keys=True) + "\n"
    if options.out is None:
        sys.stdout.write(text)
    else:
        options.out.write_text(text)
    return 1 if failures or not entries else 0


for add_some in (add_dense, add_packed, add_decode, add_linear, add_modules):
    add_some()

if __name__ == "__main__":
    sys.exit(main())
