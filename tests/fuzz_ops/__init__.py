"""Random arguments, valid and invalid, for the native operators, between guard pages.

    python -m tests.fuzz_ops --seconds 600 --seed 1
    python -m tests.fuzz_ops --case 1:37        # this one again, in this process

A case passes in two ways. The operator raises an ordinary exception and changes no byte. Or its
results and bytes equal those of the pure-torch reference with the same arguments in ordinary
memory. Each batch runs in a separate process with another instruction set; a signal is therefore a
failure that names its case. Linux only.
"""
