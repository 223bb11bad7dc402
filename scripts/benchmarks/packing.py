"""
How long packing takes: sequences of mixed length, one core.

    OMP_NUM_THREADS=1 python scripts/benchmarks/packing.py --sequences 1000000 --mean-length 200 --seq-length 4096

Two times per strategy: the packing itself (choosing rows and copying tokens, in map batches of 1000 sequences), and the
whole of `pack_dataset`, which also reads the dataset and writes the packed one to the cache.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time

import datasets
import numpy as np
import pyarrow as pa

from trl import pack_dataset
from trl.data.packing import STRATEGIES, packing_efficiency


def make_table(n_sequences: int, mean_length: int, max_length: int, seed: int = 0) -> pa.Table:
    """Sequences with lengths as in real chat data: log-normal, a long tail. Ids and labels, 32 and 64 bits wide."""
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(np.log(mean_length) - 0.5, 1.0, n_sequences), 1, max_length).astype(np.int64)
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    ids = pa.array(rng.integers(0, 50_000, int(lengths.sum()), dtype=np.int32))
    columns = {"input_ids": pa.ListArray.from_arrays(offsets, ids)}
    columns["labels"] = pa.ListArray.from_arrays(offsets, ids.cast(pa.int64()))
    return pa.table(columns)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=1_000_000)
    parser.add_argument("--mean-length", type=int, default=200)
    parser.add_argument("--max-length", type=int, default=8192)
    parser.add_argument("--seq-length", type=int, default=4096)
    parser.add_argument("--batch-size", type=int, default=1000)
    args = parser.parse_args()

    pa.set_cpu_count(1)
    datasets.disable_progress_bars()
    table = make_table(args.sequences, args.mean_length, args.max_length)
    n_tokens = len(table["input_ids"].combine_chunks().flatten())
    print(f"{args.sequences:,} sequences, {n_tokens:,} tokens, rows of {args.seq_length:,}")
    dataset = datasets.Dataset(table)
    for strategy, (pack, options) in STRATEGIES.items():
        start = time.perf_counter()
        lengths = []
        for first in range(0, len(table), args.batch_size):
            packed = pack(table.slice(first, args.batch_size), seq_length=args.seq_length, **options)
            lengths.append(packed["input_ids"].combine_chunks().value_lengths())
        seconds = time.perf_counter() - start
        efficiency = packing_efficiency(np.concatenate(lengths), args.seq_length)

        folder = tempfile.mkdtemp()
        start = time.perf_counter()
        cache = f"{folder}/packed.arrow"
        pack_dataset(dataset, args.seq_length, strategy, {"batch_size": args.batch_size, "cache_file_name": cache})
        whole = time.perf_counter() - start
        shutil.rmtree(folder)
        print(f"{strategy:>10}: packing {seconds:5.2f} s, pack_dataset {whole:5.2f} s, {efficiency:.2%} full")


if __name__ == "__main__":
    main()
