"""What the operations know of a batch: which images belong together, as tables built on the host.

Legend: I images in the batch, S samples (groups), N the largest number of images of a sample.

The images of a sample are neighbours, in order. All sizes that a kernel launch needs are sizes of these tensors, so
nothing waits for the device.
"""

from typing import Literal, Protocol

from torch import Tensor

Context = Literal["others", "all"]
"""What a context reads. `others`: one per image, the sample's other images; `all`: one per sample, all its images."""


class ImageTables(Protocol):
    """Who shares an instruction with whom. `samtrain.core.batch.ImageGroups` is one."""

    @property
    def group_of_image(self) -> Tensor:
        """[I] int64, the sample an image belongs to."""

    @property
    def slot_of_image(self) -> Tensor:
        """[I] int64, its place 0..N-1 within the sample."""

    @property
    def images_of_group(self) -> Tensor:
        """[S, N] int64, the images of each sample; 0 where `valid` is False."""

    @property
    def valid(self) -> Tensor:
        """[S, N] bool."""

    @property
    def cu_images(self) -> Tensor:
        """[S+1] int32, the first image of each sample and, last, the number of images."""
