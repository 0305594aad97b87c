"""The style: pictures in axes, colours of the groups."""

from __future__ import annotations

import numpy as np
import torch

from ec2face_core.attributes import CLASS_ID, GROUPS
from ec2face_lab.plots import style


def test_pictures_are_shown_with_their_values():
    red = torch.tensor([1.0, -1.0, -3.0]).view(3, 1, 1).expand(3, 2, 2)
    assert np.array_equal(style.picture(red)[0, 0], [1, 0, 0])
    mask = style.mask_picture(torch.tensor([[CLASS_ID["skin"]]]))
    assert np.allclose(mask, np.array([204, 0, 0]) / 255)


def test_groups_have_a_colour_and_a_name_each():
    assert set(style.GROUP_COLOURS) == set(style.GROUP_NAMES) == set(GROUPS)
