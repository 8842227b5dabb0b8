"""What torch's compilers do at the moment."""

import torch


def is_exporting() -> bool:
    """Whether torch.export traces the program.

    ``torch.compiler.is_exporting`` says so under torch.compile, too, in torch 2.11.
    """
    return torch.compiler._is_exporting_flag
