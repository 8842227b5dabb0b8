"""Drawn arguments, right and wrong, for the native operators, between guard pages.

    python -m tests.fuzz_ops --seconds 600 --seed 1
    python -m tests.fuzz_ops --case 1:37        # this one again, in this process

A case passes in one of two ways: the operator raises an ordinary exception and not a byte is
changed; or its results and bytes are those of the pure-torch reference, on the same arguments in
ordinary memory. Batches run in processes of their own, each with another instruction set, so that a
signal is a failure that names its case. Linux only.
"""
