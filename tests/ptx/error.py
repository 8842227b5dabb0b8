"""What the interpreter raises."""


class Error(Exception):
    """A kernel did what it must not do. ``kind`` names it; the rest says where."""

    def __init__(self, kind, what, instruction="", kernel="", block=None, thread=None):
        self.kind = kind
        self.what = what
        self.instruction = instruction
        self.kernel = kernel
        self.block = block
        self.thread = thread
        super().__init__(kind, what)

    def __str__(self):
        where = f"{self.kernel}, block {self.block}, thread {self.thread}: {self.instruction}"
        return f"{self.kind}: {self.what}; at {where}"


class UnknownForm(Exception):
    """The interpreter has no function for this instruction."""
