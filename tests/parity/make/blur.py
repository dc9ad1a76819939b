"""The smoothing of heat maps as in the official codes, whose borders are not those of anomalib's."""

# pyright: reportMissingImports=false
import torch
from scipy.ndimage import gaussian_filter


class ScipyBlur(torch.nn.Module):
    """scipy's Gaussian filter of every map, in place of anomalib's GaussianBlur2d."""

    def __init__(self, sigma, **options):
        super().__init__()
        self.sigma = sigma if isinstance(sigma, tuple) else (sigma, sigma)

    def forward(self, maps):
        return torch.from_numpy(gaussian_filter(maps.numpy(), (0, 0, *self.sigma)))
