"""The parts of ``python -m fastguard.gpucheck``. Each takes a device.

All parts that do not need CUDA run on the CPU too. The tests run them there.
"""
