"""The parts of ``python -m fastguard.gpucheck``: each takes a device, and all but CUDA's own run on
the CPU too, where the tests try them."""
