"""CIFAR's images on the device, and the 162 views of each that crop and flip can ask for.

A view's number is (row * 9 + column) * 2 + flip, with row and column of the crop in the image padded by 4.
"""
import hashlib

import torch
import torch.nn.functional as F

VIEWS = 9 * 9 * 2
CENTRE = (4 * 9 + 4) * 2  # the image as it is
PLACES = torch.tensor([18, 2, 1])  # of row, column and flip in a view's number
REFLECTED = torch.tensor([4, 3, 2, 1, *range(32), 30, 29, 28, 27])


def pad(images: torch.Tensor, padding: str) -> torch.Tensor:
    """[..., 32, 32] -> [..., 40, 40]"""
    return F.pad(images, (4, 4, 4, 4)) if padding == 'zeros' else images[..., REFLECTED[:, None], REFLECTED]


class Resident:
    def __init__(self, source, device: torch.device, padding: str = 'zeros'):
        pixels = torch.from_numpy(source.pixels).permute(0, 3, 1, 2)
        self.padded = pad(pixels, padding).contiguous().to(device)  # [N, 3, 40, 40]
        self.targets = torch.tensor(source.targets, device=device)

    def views(self, index: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        """[B], [B] -> [B, 3, 32, 32], uint8: rows are copied, and columns picked of them, backwards for a flip."""
        index, row, column, flip = (x.view(-1, 1, 1, 1) for x in (index, number // 18, number // 2 % 9, number % 2))
        along, channel = torch.arange(32, device=index.device), torch.arange(3, device=index.device).view(-1, 1, 1)
        rows = (index * 3 + channel) * 40 + row + along.view(-1, 1)  # [B, 3, 32, 1]
        columns = column + torch.where(flip == 1, 31 - along, along)  # [B, 1, 1, 32]
        cut = self.padded.view(-1, 40).index_select(0, rows.flatten()).view(*rows.shape[:3], 40)
        return cut.gather(3, columns.expand(-1, 3, 32, -1))

    def fingerprint(self) -> str:
        return hashlib.sha256(self.padded.cpu().numpy()).hexdigest()[:16]
