"""The guard in other people's trainers: a module for each, which imports its package.

Each is a thin layer over :meth:`fastguard.GradGuard.attach`. It attaches the guard as soon as the
trainer has its optimizer, logs what the guard did with the trainer's own logger, and lets the
trainer's learning rate scheduler step with applied steps only. ``pip install
'torch-fastguard[integrations]'`` installs the packages.
"""
