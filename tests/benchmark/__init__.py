"""The benchmark of patching sweeps: the same sweep with sinklens and with its peers, in one process, side by side.

The sweep transplants ``resid_pre`` of a source run into a clean run, one (block, position) cell at a time, and reads
the attention that one position receives from later queries, averaged over heads, in a late block.

* :mod:`tests.benchmark.workload`: the sweep, as data;
* :mod:`tests.benchmark.shapes`: one model, as Hugging Face and as TransformerLens have it, with equal weights;
* :mod:`tests.benchmark.peers`, :mod:`tests.benchmark.hf_peers`: how each library runs the sweep;
* :mod:`tests.benchmark.measure`: equal numbers first, then time;
* :mod:`tests.benchmark.flops`: the arithmetic that the sweep needs, and what the device can do;
* :mod:`tests.benchmark.record`: table, JSON and figure.

``python -m tests.benchmark`` runs it.
"""
