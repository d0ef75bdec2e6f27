"""ComfyUI's node, called as ComfyUI calls it."""

import pytest
import torch

from cea_arch.errors import UserError
from cea_arch.interop.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from cea_arch.restoring.fitting import Fit

pytestmark = pytest.mark.usefixtures('one_thread')


def test_the_node_restores_a_batch(small_net, model):
    (name,) = NODE_CLASS_MAPPINGS.keys() & NODE_DISPLAY_NAME_MAPPINGS.keys()
    kind = NODE_CLASS_MAPPINGS[name]
    asked = kind.INPUT_TYPES()['required']
    assert asked['image'] == ('IMAGE',)
    image = torch.rand(2, 20, 31, 3)
    choices = {key: value[0][0] for key, value in asked.items() if isinstance(value[0], list)}
    (found,) = getattr(kind(), kind.FUNCTION)(image=image, model=model, **choices)
    assert kind.RETURN_TYPES == ('IMAGE',)
    with torch.no_grad():
        expected = Fit(small_net.trained_multiple).run(small_net, image.movedim(-1, 1)).clamp(0, 1).movedim(1, -1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match='does not exist'):
        kind().run(image, 'nowhere.pth', 'fp32', 'whole')
