"""Re-ranked retrieval with the PyTorch model against the runtime's `search(rerank=)`."""

from pathlib import Path

from unidiff_sdk import Bundle, Catalog
from unidiff_sdk.datasets.synthetic import write_catalog
from unidiff_sdk.training.checkpoints.checkpoint import load_checkpoint
from unidiff_sdk.training.data.pairs import load_pairs
from unidiff_sdk.training.evaluation.reranking import reranked_order
from unidiff_sdk.training.evaluation.retrieval import embed_pairs
from unidiff_sdk.training.objective.joint_model import JointModel


def test_the_order_is_that_of_the_runtime(tmp_path: Path) -> None:
    write_catalog("fashion-woman", tmp_path / "products", n=16, seed=3, split="test-unseen")
    checkpoint, bundle = load_checkpoint("tiny"), Bundle.open("tiny")
    settings = bundle.manifest.rerank
    assert settings is not None
    pairs = load_pairs(tmp_path / "products", checkpoint)
    model = JointModel(checkpoint).eval()
    order = reranked_order(model, checkpoint, pairs, *embed_pairs(model, checkpoint, pairs), settings)

    with Catalog(":memory:", bundle=bundle) as catalog:
        catalog.add_folder(tmp_path / "products")
        k = settings.candidates
        found = [catalog.search(caption, rerank=k, limit=k) for caption in pairs.captions]
    ids = [payload["id"] for payload in pairs.payloads]
    assert order.shape == (len(pairs), settings.candidates)
    assert [[ids[row] for row in rows] for rows in order] == [[hit.id for hit in hits] for hits in found]
