"""PyTorch among the subjects: eager and compiled, its calls in a CUDA graph."""

import functools
import importlib.util


def subjects(operation, arguments, backward: bool, repeats: int):
    """For `timing.compare`, eager and compiled; {} without PyTorch, or where it has no CUDA.

    Args:
      operation: the function to time, from device and dtype.
      arguments: makes the JAX arrays: those of the operation, and `out_grad`.
      repeats: how many calls a CUDA graph holds.
    """
    if importlib.util.find_spec("torch") is None:
        return {}
    import torch

    if not torch.cuda.is_available():
        return {}

    def build(compiled: bool):
        shared = {name: torch.from_dlpack(array) for name, array in arguments().items()}
        given = {name: array.clone() for name, array in shared.items()}
        torch.cuda.synchronize()  # before JAX frees what was copied
        del shared
        out_grad = given.pop("out_grad")
        function = operation(out_grad.device, out_grad.dtype)
        if compiled:
            torch._dynamo.reset()
            function = torch.compile(function, mode="max-autotune-no-cudagraphs", dynamic=False)
        if not backward:
            return _graph(lambda: function(**given), repeats, inference=True)
        leaves = [array.requires_grad_() for array in given.values()]
        return _graph(lambda: torch.autograd.grad(function(**given), leaves, out_grad), repeats)

    return {
        "torch eager": functools.partial(build, False),
        "torch compiled": functools.partial(build, True),
    }


def _graph(call, repeats: int, inference: bool = False):
    """A function that does `repeats` calls from a CUDA graph, and waits."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.inference_mode(inference):
        with torch.cuda.stream(side):  # compiles, and gives cuDNN its chance to choose
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                call()

    def run():
        graph.replay()
        torch.cuda.synchronize()

    return run
