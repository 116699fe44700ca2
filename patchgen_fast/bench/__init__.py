"""The benchmark suite: cases, peers, timing, results, comparison.

`patchgen-fast bench` is the way in; `patchgen_fast.bench.runner.run` is the same in Python.

    cases       what is measured: named real shapes by op, layer, block and model
    problems/   for each case: inputs, float64 truth, eager, peers, ours
    timing      interleaved rounds, discarded disturbances, paired samples
    parity      the rule that stands before every number
    results     one JSON, written as the run goes
    compare     old against new, gated on the speed-up ratio
"""
