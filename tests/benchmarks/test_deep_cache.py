"""`benchmarks/deep_cache.py`: a split UNet equals diffusers' own, and features are reused between complete calls."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")
pytest.importorskip("onnx", reason="needs the export extra")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from deep_cache import DEEP, OUTPUT, CachedSession, CachedUNet, count_work  # noqa: E402

CONFIG = {
    "sample_size": 8,
    "block_out_channels": (8, 16, 16),
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "attention_head_dim": 2,
    "cross_attention_dim": 8,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}


@pytest.mark.parametrize("depth", [0, 2, 5, 8])
def test_a_split_unet_equals_that_of_diffusers(depth: int) -> None:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(**CONFIG).eval()
    sample, timestep, states = torch.randn(2, 4, 8, 8), torch.tensor([700.0, 3.0]), torch.randn(2, 5, 8)
    split = CachedUNet(unet, depth)
    with torch.inference_mode():
        expected = unet(sample, timestep, states).sample
        output, deep = split(sample, timestep, states)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(split(sample, timestep, states, deep)[0], expected)
        other = split(sample, timestep, states, deep + 1)[0]
    assert not torch.allclose(other, expected)  # the features that it is given decide


def test_the_work_of_a_shallow_call_grows_with_its_depth() -> None:
    works = [count_work(CONFIG, side=8, tokens=5, depth=depth) for depth in (0, 2, 5, 8)]
    shares = [work.shallow / work.complete for work in works]
    assert 0 < works[0].self_attention < works[0].complete
    assert shares == sorted(set(shares))
    assert shares[-1] < 1  # without the middle


class Recorded:
    """A session that returns its number of calls as deep features, and records those that it receives."""

    def __init__(self, *inputs: str) -> None:
        self.inputs = self.outputs = dict.fromkeys(inputs)
        self.providers, self.captured, self.received = (), False, []

    def run(self, feeds: dict[str, Any], outputs: list[str]) -> dict[str, Any]:
        assert set(feeds) == set(self.inputs)
        self.received.append(feeds.get(DEEP))
        return {name: len(self.received) for name in outputs}


def test_every_third_call_of_a_generation_is_complete() -> None:
    complete, shallow = Recorded("timestep", "encoder_hidden_states"), Recorded("timestep", DEEP)
    session = CachedSession(complete, shallow, interval=3)
    for _ in range(2):  # generations of five steps
        for timestep in (999.0, 800.0, 600.0, 400.0, 200.0):
            feeds = {"timestep": np.array([timestep, timestep]), "encoder_hidden_states": np.zeros(1)}
            assert set(session.run(feeds, [OUTPUT])) == {OUTPUT}
    assert len(complete.received) == 4
    assert shallow.received == [1, 1, 2, 3, 3, 4]
