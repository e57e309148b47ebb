"""Where loader processes put the images of a batch."""
import torch
from torch import Tensor


class Slots:
    """Shared memory of a loader process, in which its batches take turns.

    In new memory for each batch the system would clear every page, and take it back soon after: a tenth of the time
    that a JPEG takes, and a third of that of raw pixels. So a batch is only there until `number` others of the same
    process have followed it.
    """

    def __init__(self, number: int):
        self.slots, self.turn = [None] * number, 0

    def __call__(self, images: list[Tensor]) -> Tensor:
        self.turn, first = (self.turn + 1) % len(self.slots), images[0]
        slot = self.slots[self.turn]
        if slot is None or len(slot) < len(images) or (slot.shape[1:], slot.dtype) != (first.shape, first.dtype):
            slot = torch.empty(len(images), *first.shape, dtype=first.dtype).share_memory_()
            self.slots[self.turn] = slot
        return torch.stack(images, out=slot[:len(images)])
