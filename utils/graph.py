"""A CUDA graph: what a function once asked of the device, asked for again in one go.

Small networks take less time than the launching of their kernels, one by one. A graph launches them at once, on the
same memory every time: what goes in is copied there, what comes out is copied from there.
"""
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from models.errors import line

WARM_UP = 3  # calls before: kernels are chosen in them, and all is allocated that will stay

_drawn = None  # event on the device: the last of the graphs that draw is over


class Recorded:
    """Calls of a function from a batch to tensors, the first few as they are, the others as a graph.

    All batches have the same shapes. What else the function reads stays where it is, and is changed in place.
    """

    def __init__(self, function: Callable):
        self.function, self.calls, self.batch = function, 0, None

    def __call__(self, batch) -> list[Tensor]:
        self.calls += 1
        if self.calls <= WARM_UP:
            return self.function(batch)
        if self.batch is None:
            self.batch = batch._replace(**{name: x.clone() for name, x in batch.seen().items()})
            self.replay, self.results = record(lambda: self.function(self.batch))
        for name, x in batch.seen().items():
            getattr(self.batch, name).copy_(x, non_blocking=True)
        self.replay()
        return [x.clone() for x in self.results]


def record(function: Callable) -> tuple[Callable, list[Tensor]]:
    """Record what the function asks of the device, which is not done yet.

    Returns a function that has it done, and the tensors where its results are then.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    generator = torch.cuda.default_generators[stream.device.index]
    # The default stream cannot be recorded; for None torch takes one that it keeps for graphs. A run beside others has
    # a stream of its own, and is recorded there: libraries have memory for each stream, which runs must not share.
    # thread_local: meanwhile, threads of loaders may pin memory.
    recorded = stream if stream != torch.cuda.default_stream() else None
    try:
        with torch.cuda.graph(graph, stream=recorded, capture_error_mode='thread_local'):
            results = function()
    except RuntimeError as error:
        full = next((e for e in (error, error.__context__) if isinstance(e, torch.OutOfMemoryError)), None)
        if full:  # which has words of its own; the end of the recording may have raised another error over it
            raise full from None
        sys.exit(f'error: --cuda-graph: not all of an update can be recorded ({line(error)}); leave it out')

    def replay():
        """All graphs read the seed of what they draw in one place: those that draw come one after the other."""
        global _drawn
        before = generator.get_offset()
        if _drawn:
            stream.wait_event(_drawn)
        graph.replay()
        if generator.get_offset() != before:
            _drawn = stream.record_event()
    return replay, results
