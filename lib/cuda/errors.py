"""What can go wrong with a kernel."""


class KernelError(RuntimeError):
    """A kernel failed while it ran: it left an array, or waited at a barrier in divergent code. The arrays are as they were before the launch."""


class CompileError(KernelError):
    """The source does not compile; the message has the file and the line."""


class MissingTool(KernelError):
    """There is no C++ compiler (for NumPy arrays), no GPU (for CuPy arrays), or no NVRTC (for the compile check)."""


class ArgumentError(TypeError, ValueError):
    """A launch with wrong arguments; nothing has run. The message names the argument, what it was and what it should be."""
