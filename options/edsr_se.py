"""EDSR with squeeze and excitation in each block: what channel attention gives the host of cea_study_edsr.yml."""

from basicsr.archs.arch_util import ResidualBlockNoBN
from basicsr.archs.edsr_arch import EDSR
from basicsr.archs.rcan_arch import ChannelAttention
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn


class Block(ResidualBlockNoBN):
    """A residual block whose branch is scaled, channel by channel, by what its mean over the image decides."""

    def __init__(self, num_feat: int) -> None:
        super().__init__(num_feat)
        self.attention = ChannelAttention(num_feat)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.conv2(self.relu(self.conv1(x)))) * self.res_scale


@ARCH_REGISTRY.register()
class EDSRWithSE(EDSR):
    """As EDSR."""

    def __init__(self, num_in_ch: int, num_out_ch: int, num_feat: int, num_block: int, upscale: int) -> None:
        super().__init__(num_in_ch, num_out_ch, num_feat, num_block, upscale)
        self.body = nn.Sequential(*(Block(num_feat) for _ in range(num_block)))
