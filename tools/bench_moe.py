#!/usr/bin/env python3
"""Time an MoE layer, per backend, against a dense MLP of equal FLOPs. See `--help`."""

from m3bsr.cli.bench_moe import main

if __name__ == "__main__":
    main()
