"""Evaluation: known cases, images of the diffusers pipeline, and consistent figures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

from diffusers import DDIMScheduler, StableDiffusionPipeline  # noqa: E402
from transformers import CLIPModel  # noqa: E402

from unidiff_sdk.datasets.synthetic import write_catalog  # noqa: E402
from unidiff_sdk.errors import DataError, OptionError  # noqa: E402
from unidiff_sdk.generation.samplers import make_table  # noqa: E402
from unidiff_sdk.inference.schedule import Schedule  # noqa: E402
from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint  # noqa: E402
from unidiff_sdk.training.data.captions import tokenize  # noqa: E402
from unidiff_sdk.training.data.pairs import load_pairs  # noqa: E402
from unidiff_sdk.training.evaluation.evaluate import evaluate  # noqa: E402
from unidiff_sdk.training.evaluation.retrieval import embed_pairs, retrieval_figures, synthetic_attributes  # noqa: E402
from unidiff_sdk.training.evaluation.sampling import generate_images  # noqa: E402
from unidiff_sdk.training.objective.joint_model import JointModel  # noqa: E402


class MeanColor:
    """A simple judge: the features of an image are its 2x2 mean colors, and every product is a dress."""

    def __init__(self) -> None:
        self.record = {"sha256": "0" * 64}

    def features(self, images) -> np.ndarray:
        blocks = [np.asarray(i, np.float32).reshape(2, i.shape[0] // 2, 2, i.shape[1] // 2, 3) for i in images]
        return np.stack([block.mean(axis=(1, 3)).ravel() / 255 + 0.01 for block in blocks]).astype(np.float32)

    def attributes(self, images) -> dict[str, list[str]]:
        return {"type": ["dress"] * len(list(images))}


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_catalog("fashion-woman", tmp_path_factory.mktemp("synthetic") / "val", n=8, split="val")


def test_retrieval_of_equal_and_of_shifted_embeddings() -> None:
    eye = np.eye(12, dtype=np.float32)
    different = [(i,) for i in range(12)]
    perfect = {"R@1": 1.0, "R@5": 1.0, "R@10": 1.0, "median_rank": 1.0}
    assert retrieval_figures(eye, eye, different) == {"text_to_image": perfect, "image_to_text": perfect}
    wrong = retrieval_figures(eye, np.roll(eye, 1, axis=0), different)
    assert wrong["text_to_image"]["R@1"] == 0.0
    assert retrieval_figures(eye, np.roll(eye, 1, axis=0), [("same",)] * 12)["image_to_text"]["R@1"] == 1.0


def test_retrieval_directions_are_not_mixed_up() -> None:
    u = np.array([[1.0, 0.0], [0.8, 0.6]], np.float32)  # images
    v = np.array([[1.0, 0.0], [1.0, 0.0]], np.float32)  # captions, both nearest to the first image
    figures = retrieval_figures(u, v, [(0,), (1,)])
    assert figures["text_to_image"]["R@1"] == 0.5
    assert figures["image_to_text"]["R@1"] == 0.0, "both captions tie, and ties count against the query"


def test_embeddings_are_those_of_transformers(random_checkpoint: Path, small_catalog: Path) -> None:
    checkpoint = load_checkpoint(random_checkpoint)
    pairs = load_pairs(small_catalog, checkpoint)
    u, v = embed_pairs(JointModel(checkpoint), checkpoint, pairs)
    clip = CLIPModel.from_pretrained(random_checkpoint / "clip")
    pixels = checkpoint.image_processor(
        list(pairs.images[:].permute(0, 2, 3, 1).numpy()), return_tensors="pt"
    ).pixel_values
    with torch.no_grad():
        expected = clip(input_ids=tokenize(checkpoint.tokenizer, pairs.captions), pixel_values=pixels)
    np.testing.assert_allclose(u, expected.image_embeds.numpy(), atol=1e-5)
    np.testing.assert_allclose(v, expected.text_embeds.numpy(), atol=1e-5)


def test_generated_images_are_those_of_the_diffusers_pipeline(random_checkpoint: Path) -> None:
    checkpoint = load_checkpoint(random_checkpoint)
    pipeline = StableDiffusionPipeline.from_pretrained(random_checkpoint)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    captions = ["a red dress", "a teal mug"]
    table = make_table("ddim", Schedule.from_config(checkpoint.scheduler.config), 4)
    ours = generate_images(JointModel(checkpoint), checkpoint, captions, table=table, guidance=5.0, seed=3)
    streams = [np.random.default_rng([3, i]) for i in range(2)]
    latents = torch.from_numpy(np.stack([s.standard_normal((4, 16, 16), dtype=np.float32) for s in streams]))
    theirs = pipeline(captions, latents=latents, guidance_scale=5.0, num_inference_steps=4, output_type="np").images
    assert np.abs(np.stack(ours) / 255.0 - theirs).max() <= 1.5 / 255


def test_attributes_are_known_for_synthetic_data_only(
    random_checkpoint: Path, small_catalog: Path, synthetic: Path
) -> None:
    checkpoint = load_checkpoint(random_checkpoint)
    known = synthetic_attributes(load_pairs(synthetic, checkpoint))
    assert known is not None and set(known[0]) == {"type", "colour", "colour2", "pattern", "length", "fit"}
    assert synthetic_attributes(load_pairs(small_catalog, checkpoint)) is None


def test_all_figures_on_synthetic_data(random_checkpoint: Path, synthetic: Path) -> None:
    stages: list[str] = []
    evaluation = evaluate(
        random_checkpoint,
        synthetic,
        prompts=3,
        per_prompt=2,
        steps=2,
        train_data=synthetic,
        base=random_checkpoint,
        base_data=synthetic,
        judge=MeanColor(),
        on_stage=stages.append,
    )
    figures = json.loads(json.dumps(evaluation.figures, allow_nan=False))
    assert figures["relevance"] == "attributes" and figures["generation"]["judge_covers_data"] is True
    assert set(figures["retrieval"]["text_to_image"]) == {"R@1", "R@5", "R@10", "median_rank"}
    assert {"kid", "kid_floor", "cmmd", "cmmd_floor", "attribute_accuracy"} <= set(figures["generation"])
    assert figures["collapse"]["nearest_training_image"]["real"] == pytest.approx(1.0)
    assert 0 <= figures["collapse"]["per_prompt_diversity"] <= 2
    assert figures["forgetting"]["drop"] == pytest.approx(0.0)
    assert evaluation.sheet is not None and evaluation.sheet.size == (6 * 32, 32)
    assert "Measuring retrieval" in stages and "Judging the generated images" in stages


def test_generation_uses_the_own_sampler_of_a_checkpoint(
    random_checkpoint: Path, synthetic: Path, tmp_path: Path
) -> None:
    few = Path(shutil.copytree(random_checkpoint, tmp_path / "few"))
    meta = json.loads((few / "unidiff.json").read_text())
    sampler = {"name": "ddim", "steps": 2, "guidance_scale": 1.0}
    (few / "unidiff.json").write_text(json.dumps(meta | {"sampler": sampler}))
    own = evaluate(few, synthetic, prompts=2, per_prompt=1, judge=MeanColor()).figures["generation"]
    assert (own["sampler"], own["steps"], own["guidance"]) == ("ddim", 2, 1.0)
    given = evaluate(few, synthetic, prompts=2, per_prompt=1, judge=MeanColor(), sampler="euler", steps=3, guidance=2.0)
    assert (given.figures["generation"]["sampler"], given.figures["generation"]["steps"]) == ("euler", 3)
    none = evaluate(random_checkpoint, synthetic, prompts=2, per_prompt=1, judge=MeanColor(), guidance=1.0).figures[
        "generation"
    ]
    assert (none["sampler"], none["steps"]) == ("ddim", 20)


def test_no_guidance_is_half_the_work(random_checkpoint: Path) -> None:
    loaded = load_checkpoint(random_checkpoint)
    model = JointModel(loaded).eval()
    calls: list[int] = []
    model.unet.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    table = make_table("ddim", Schedule.from_config(loaded.scheduler.config), 2)
    images = {
        scale: generate_images(model, loaded, ["boots", "coat"], table=table, guidance=scale, seed=0)
        for scale in (1.0, 1 + 1e-6)
    }
    assert calls == [2, 2, 2, 2, 2, 2]
    apart = np.abs(np.array(images[1.0], int) - np.array(images[1 + 1e-6], int))
    assert apart.max() <= 1


def test_retrieval_only_generates_nothing(random_checkpoint: Path, small_catalog: Path) -> None:
    evaluation = evaluate(
        random_checkpoint, small_catalog, prompts=np.int64(0), seed=np.array(1), guidance=np.float32(2)
    )
    assert evaluation.figures["relevance"] == "captions" and evaluation.sheet is None
    assert "generation" not in evaluation.figures and "forgetting" not in evaluation.figures


def test_invalid_arguments_are_refused(random_checkpoint: Path, small_catalog: Path, tmp_path: Path) -> None:
    types = ({"prompts": 1.5}, {"per_prompt": True}, {"steps": "4"}, {"guidance": float("nan")}, {"seed": None})
    values = ({"prompts": -1}, {"per_prompt": 0}, {"steps": 0}, {"base": random_checkpoint}, {"limit": 1})
    for wrong in (*types, *values):
        with pytest.raises(OptionError):
            evaluate(random_checkpoint, small_catalog, **wrong)
    with pytest.raises(DataError):
        evaluate(random_checkpoint, tmp_path / "nowhere")
