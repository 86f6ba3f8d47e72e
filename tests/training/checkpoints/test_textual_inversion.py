"""Textual inversion: tokens with learned vectors, equal to those that diffusers loads, and unknown to search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs the train extra")

from diffusers import StableDiffusionPipeline  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from support.lora_files import make_lora  # noqa: E402
from support.random_checkpoint import MAX_TOKENS, WIDTH  # noqa: E402

from unidiff_sdk.errors import CheckpointError, OptionError  # noqa: E402
from unidiff_sdk.inference.encoder import load_tokenizer  # noqa: E402
from unidiff_sdk.inference.tokenizer import expand_tokens  # noqa: E402
from unidiff_sdk.training.checkpoints.bases import load_base  # noqa: E402
from unidiff_sdk.training.checkpoints.checkpoint import Checkpoint, load_checkpoint  # noqa: E402
from unidiff_sdk.training.checkpoints.loading.options import BaseOptions, TextualInversion  # noqa: E402
from unidiff_sdk.training.config import TrainingConfig  # noqa: E402
from unidiff_sdk.training.data.captions import tokenize  # noqa: E402
from unidiff_sdk.training.loop.trainer import train  # noqa: E402

PROMPTS = ["a red <shoe> by glow", "<SHOE>, <shoe>", "a red dress", "glow_2 <shoe>_9", "<shoe>_1 a"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:Only prompts know the added tokens"),
    pytest.mark.filterwarnings("ignore:.*changes the text encoder"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A token of three vectors in the format of diffusers, and one of one vector in that of AUTOMATIC1111."""
    folder, generator = tmp_path_factory.mktemp("inversions"), torch.Generator().manual_seed(0)
    save_file({"<shoe>": torch.randn(3, WIDTH, generator=generator)}, folder / "learned_embeds.safetensors")
    save_file({"emb_params": torch.randn(1, WIDTH, generator=generator).half()}, folder / "glow.safetensors")
    return sorted(folder.iterdir(), reverse=True)


@pytest.fixture(scope="module")
def pipeline(random_checkpoint: Path, files: list[Path]) -> Any:
    pipeline = StableDiffusionPipeline.from_pretrained(random_checkpoint)
    pipeline.load_textual_inversion(files[0])
    pipeline.load_textual_inversion(files[1], token="glow")
    return pipeline


def load(base: Path, *files: str | Path, **options: Any) -> Checkpoint:
    return load_base(base, options=BaseOptions.of(textual_inversion=files, **options))


def tensors(model: Any) -> dict[str, Any]:
    return {name.removeprefix("text_model."): tensor for name, tensor in model.state_dict().items()}


def test_tokens_and_vectors_are_those_of_diffusers(random_checkpoint: Path, files: list[Path], pipeline: Any) -> None:
    with pytest.warns(UserWarning, match="Only prompts know the added tokens <shoe>, glow. Search keeps"):
        loaded = load(random_checkpoint, *files)
    assert loaded.tokenizer.get_vocab() == pipeline.tokenizer.get_vocab()
    theirs = tensors(pipeline.text_encoder)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in tensors(loaded.text_encoder).items())
    assert [each["token"] for each in loaded.meta["textual_inversions"]] == ["<shoe>", "glow"]
    prompts = [prompt.lower() for prompt in PROMPTS]  # diffusers writes tokens out in the case of the file only
    expected = pipeline.tokenizer(
        pipeline.maybe_convert_prompt(prompts, pipeline.tokenizer),
        padding="max_length",
        truncation=True,
        max_length=MAX_TOKENS,
        return_tensors="pt",
    ).input_ids
    assert torch.equal(tokenize(loaded.tokenizer, prompts), expected)
    assert torch.equal(tokenize(loaded.tokenizer, PROMPTS), expected)


def test_runtime_reads_the_tokens_from_the_saved_tokenizer(
    random_checkpoint: Path, files: list[Path], tmp_path: Path
) -> None:
    tokenizer = load(random_checkpoint, *files).tokenizer
    tokenizer.save_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path, MAX_TOKENS)
    added = [token.content for token in ours.get_added_tokens_decoder().values()]
    found = [ours.encode(expand_tokens(prompt, added)).ids for prompt in PROMPTS]
    assert found == tokenize(tokenizer, PROMPTS).tolist()


def test_search_keeps_its_vocabulary_and_its_tower(random_checkpoint: Path, files: list[Path]) -> None:
    before, loaded = load_checkpoint(random_checkpoint), load(random_checkpoint, *files)
    assert before.shared and not loaded.shared
    assert loaded.clip_tokenizer.get_vocab() == before.clip_tokenizer.get_vocab()
    theirs = tensors(before.clip)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in tensors(loaded.clip).items())


def test_training_keeps_the_tokens(
    random_checkpoint: Path, files: list[Path], small_catalog: Path, tmp_path: Path
) -> None:
    config = TrainingConfig(steps=1, batch_size=4, warmup_steps=0, learning_rate=1e-12)
    out = train(small_catalog, random_checkpoint, tmp_path / "out", config, textual_inversion=files).path
    loaded, before = load_checkpoint(out), load(random_checkpoint, *files)
    assert torch.equal(tokenize(loaded.tokenizer, PROMPTS), tokenize(before.tokenizer, PROMPTS))
    assert len(loaded.clip_tokenizer) == len(before.clip_tokenizer) < len(loaded.tokenizer)
    expected = tensors(before.text_encoder)
    for name, tensor in tensors(loaded.text_encoder).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-8, rtol=0)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "textual inversion: `<shoe>` (`learned_embeds.safetensors`), `glow` (`glow.safetensors`)." in card


def test_lora_and_tokens_are_both_added(random_checkpoint: Path, files: list[Path], tmp_path: Path) -> None:
    make_lora(random_checkpoint, tmp_path / "a.safetensors")
    both = load(random_checkpoint, files[0], lora=tmp_path / "a.safetensors")
    lora = load(random_checkpoint, lora=tmp_path / "a.safetensors")
    expected = tensors(lora.text_encoder)
    for name, tensor in tensors(both.text_encoder).items():
        rows = len(expected[name]) if tensor.ndim else None
        assert torch.equal(tensor[:rows] if tensor.ndim else tensor, expected[name])
    assert len(both.tokenizer) == len(lora.tokenizer) + 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"clip_l": torch.ones(1, WIDTH), "clip_g": torch.ones(1, 40)}, "it is for the two text encoders of SDXL"),
        ({"a": torch.ones(WIDTH), "b": torch.ones(WIDTH)}, "it holds 2 tensors instead of one"),
        ({"<a>": torch.ones(2, WIDTH + 1)}, r"of shape \[2, 33\], but the text encoder has width 32"),
        ({"<a>": torch.ones(15, WIDTH)}, "it has 15 vectors, but a prompt has room for 14"),
        ({"<a>": torch.ones(0, WIDTH)}, "it has 0 vectors"),
        ({"<a>": torch.full((1, WIDTH), torch.nan)}, "values that are not finite"),
        ({"two words": torch.ones(WIDTH)}, "its token 'two words' has spaces"),
        ({"A</w>": torch.ones(WIDTH)}, "the vocabulary already has the token 'A</w>'"),
    ],
)
def test_file_that_does_not_fit_is_refused(
    random_checkpoint: Path, tmp_path: Path, content: dict[str, Any], message: str
) -> None:
    save_file(content, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=rf"The textual inversion .*a\.safetensors does not fit .*{message}"):
        load(random_checkpoint, tmp_path / "a.safetensors")


def test_name_of_the_token(random_checkpoint: Path, files: list[Path], tmp_path: Path) -> None:
    file = files[1]
    assert "neon" in load(random_checkpoint, f"{file}:neon").tokenizer.get_vocab()
    with pytest.raises(CheckpointError, match="its token 'glowing' is part of the token 'glow', or the reverse"):
        load(random_checkpoint, file, f"{file}:glowing")
    assert TextualInversion.parse("a.safetensors") == TextualInversion(Path("a.safetensors"))
    for token in ("", " ", "a b"):
        with pytest.raises(OptionError, match="Name one without spaces"):
            TextualInversion.parse(f"a.safetensors:{token}")
    with pytest.raises(CheckpointError, match=r"a\.pt is a pickle"):
        load(random_checkpoint, tmp_path / "a.pt")
    (tmp_path / "b.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(CheckpointError, match="it cannot be read"):
        load(random_checkpoint, tmp_path / "b.safetensors")
