"""A precision that is chosen when a bundle is opened passes the verification of an export."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs the export extra")
pytest.importorskip("onnxscript", reason="needs the export extra")
pytest.importorskip("openvino", reason="needs the openvino extra")

from unidiff_export.bundle.manifest import sampler_defaults
from unidiff_export.graphs.lowering import graph_specs
from unidiff_export.reference import make_reference, read_samples, workload_for
from unidiff_export.verification import (
    TOLERANCES,
    ToleranceError,
    compare_embeddings,
    compare_graph,
    compare_images,
    compare_search,
    expected_outputs,
)
from unidiff_sdk import Bundle
from unidiff_sdk.datasets.synthetic import write_catalog
from unidiff_sdk.generation.generator import Generator
from unidiff_sdk.inference.encoder import Encoder
from unidiff_sdk.inference.engines.auto import MIN_COSINE
from unidiff_sdk.inference.engines.openvino_runtime import _core
from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint

has_bfloat16 = "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


# The limits of fp16. Single values may deviate more: bfloat16 has 8 significant bits, half precision 11.
TOLERANCE = replace(TOLERANCES["fp16"], max_abs_error=None)


@pytest.mark.slow
@pytest.mark.skipif(not has_bfloat16, reason="needs a processor with bfloat16")
def test_bfloat16_passes_the_verification_of_an_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_catalog("fashion-woman", tmp_path / "products", n=20, split="test-unseen")
    checkpoint = load_checkpoint("tiny")
    specs = graph_specs(checkpoint)
    workload = replace(workload_for(checkpoint, "fp16"), images=2)
    samples = read_samples(checkpoint, tmp_path / "products", workload.pairs)
    reference = make_reference(checkpoint, specs, samples, workload, sampler_defaults(checkpoint))

    bundle = Bundle.open("tiny", threads=1, device="auto", precision="bf16")
    for spec in specs:
        session = bundle.session(spec.name)
        assert "bf16" in session.providers[0]
        expected = expected_outputs(spec)
        compare_graph(session, spec, TOLERANCE, expected)
        with pytest.raises(ToleranceError, match=f"{spec.name} diverges from PyTorch: largest error"):
            compare_graph(session, spec, TOLERANCES["fp32"], expected)
    encoder = Encoder(bundle)
    compare_images(Generator(bundle).generate, encoder, reference, TOLERANCE)
    assert compare_search(encoder, reference, TOLERANCE) is not None
    compare_embeddings(encoder, reference, TOLERANCE)


def test_the_limit_of_auto_is_that_of_exports() -> None:
    assert TOLERANCES["fp16"].cosine == MIN_COSINE
