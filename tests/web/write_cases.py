"""Write what Python computes as JSON, for the tests of the page: `make test-web`.

python tests/web/write_cases.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import test_filters as filters
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from unidiff_sdk import Bundle
from unidiff_sdk.cli.servers.site.items import quantize_rows
from unidiff_sdk.cli.servers.site.model import sampler_tables
from unidiff_sdk.errors import FilterError
from unidiff_sdk.generation.generator import image_rng
from unidiff_sdk.generation.samplers import advance, make_table
from unidiff_sdk.inference.encoder import Encoder
from unidiff_sdk.inference.manifest import Resize
from unidiff_sdk.inference.preprocessing import preprocess
from unidiff_sdk.retrieval.mixing import WEIGHTS, ModalityGap, mix
from unidiff_sdk.retrieval.reranking.reranker import combined_scores
from unidiff_sdk.store.filters import parse

EXAMPLES = 400
COLLECT = settings(
    max_examples=EXAMPLES, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)
TEXTS = [
    "",
    "red dress",
    "  Red\t\nDRESS  ",
    "it's a dog's life, they'll've",
    "größe ÉCLAIR ﬁn",
    "日本語 と 한국어",
    "👗👠 emoji",
    "<|endoftext|> inside <|startoftext|>",
    "a<|endoftext|>b",
    "x" * 300,
    "word " * 200,
    "3.14159 ½ ²",
    "\u0000\u200b",
    "e\u0301 vs é",
    "İstanbul ẞ",
    "snake_case-kebab/slash",
]


def is_json(value: Any) -> bool:
    """Whether a filter holds no Python dates, which JSON does not have."""
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def filter_cases() -> list[dict[str, Any]]:
    """Random items and filters of the store's tests, with the items that the brute-force evaluation selects."""
    cases: list[dict[str, Any]] = []

    @COLLECT
    @given(filters.examples)
    def collect(example: tuple[list[dict[str, Any]], list[Any]]) -> None:
        items, wheres = example
        for where in filter(is_json, wheres):
            matching = [i for i, payload in enumerate(items) if filters.matches(where, payload)]
            cases.append({"items": items, "where": where, "matching": matching})

    collect()
    return cases


def parsing_cases() -> list[dict[str, Any]]:
    """Random JSON, mostly not a filter, and whether Python accepts it."""
    elements = ["a[0]", "a[]", "a[].b", '"a b"[0]', "a b[0]", '"a[0]"', "a[x]", "a[", "[0]", '"a"b', "a[1234567890]"]
    names = st.sampled_from(
        ["price", "and", "or", "not", "a.b", '"a.b"', "", ".", "eq", "in", "gt", "near", "exists", *elements]
    )
    scalars = st.one_of(
        st.none(), st.booleans(), st.integers(-9, 9), st.sampled_from(["", "x", "2024-05-01", "2024-13-01"])
    )
    values = st.recursive(
        scalars,
        lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(names, inner, max_size=2)),
        max_leaves=6,
    )
    cases: list[dict[str, Any]] = []

    @COLLECT
    @given(values)
    def collect(where: Any) -> None:
        try:
            parse(where)
        except FilterError:
            cases.append({"where": where, "valid": False})
        else:
            cases.append({"where": where, "valid": True})

    collect()
    return cases


def json_cases() -> list[str]:
    """Random JSON with integers of 64 bits, and with strings and fractions that look like them."""
    leaves = st.one_of(
        st.integers(-(2**63), 2**63 - 1),
        st.sampled_from([2**53, 2**53 + 1, -(2**53) - 1, 0.30211037397384644, -2.25, True, None]),
        st.sampled_from(["9007199254740993", ": 9007199254740993,", 'a "9007199254740993" b', "\\", '\\"']),
        st.text(max_size=8),
    )
    names = st.sampled_from(["id", "9007199254740993 cm", 'a "b"', "größe"])
    values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3))
    cases: list[str] = []

    @COLLECT
    @given(values)
    def collect(value: Any) -> None:
        cases.append(json.dumps(value, ensure_ascii=False, separators=(",", ":")))

    collect()
    return cases


def token_cases(bundle: Bundle) -> dict[str, Any]:
    """Token ids of unusual texts."""
    texts = list(TEXTS)

    @settings(COLLECT, max_examples=200)
    @given(st.text(max_size=40))
    def collect(text: str) -> None:
        texts.append(text)

    collect()
    encoder = Encoder(bundle)
    valid = [text for text in texts if not any("\ud800" <= letter <= "\udfff" for letter in text)]
    return {
        "tokenizer": bundle.config("tokenizer/tokenizer.json"),
        "config": bundle.config("tokenizer/tokenizer_config.json"),
        "max_tokens": bundle.max_tokens,
        "texts": valid,
        "ids": encoder.tokenize(valid).tolist(),
        "too_long": [text in set(encoder.too_long(valid)) for text in valid],
    }


def image_cases() -> list[dict[str, Any]]:
    """Random images of several shapes and what Pillow makes of them.

    None is taller than wide: Pillow 13 then resizes the height first, which changes a few pixels by one level.
    """
    rng, cases = np.random.default_rng(0), []
    mean, std = np.array([0.5, 0.4, 0.3], np.float32), np.array([0.2, 0.3, 0.4], np.float32)
    for width, height in ((16, 16), (40, 23), (31, 29), (5, 5), (64, 9)):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        for fit, resize in (
            ("crop", None),
            ("pad", None),
            ("crop", Resize(20, interpolation="bilinear")),
            ("crop", Resize(18, squash=True, interpolation="lanczos")),
        ):
            expected = preprocess(Image.fromarray(pixels), 16, mean, std, fit, resize)  # type: ignore[arg-type]
            cases.append(
                {
                    "width": width,
                    "height": height,
                    "pixels": pixels.ravel().tolist(),
                    "expected": expected.ravel().tolist(),
                    "input": {
                        "size": 16,
                        "mean": mean.tolist(),
                        "std": std.tolist(),
                        "fit": fit,
                        "resize": resize
                        and {
                            "side": resize.side,
                            "squash": resize.squash,
                            "interpolation": resize.interpolation,
                        },
                    },
                }
            )
    return cases


def sampler_cases(bundle: Bundle) -> dict[str, Any]:
    """The tables as the page reads them, their exact float32 values, and a trajectory of each."""
    schedule, rng = bundle.schedule(), np.random.default_rng(1)
    tables = sampler_tables(schedule, bundle.sampler.name, bundle.sampler.steps)
    exact, trajectories = {}, {}
    for name, by_steps in tables.items():
        exact[name] = {s: make_table(name, schedule, int(s)).rows.view(np.uint32).tolist() for s in by_steps}
        table = make_table(name, schedule, 8)
        x, x0 = rng.standard_normal(6, np.float32), np.zeros(6, np.float32)
        outputs, noises = rng.standard_normal((2, len(table), 6), np.float32)
        start = x.tolist()
        for step in range(len(table)):
            x, x0 = advance(table[step], x, outputs[step], x0, noises[step])
        trajectories[name] = {
            "start": start,
            "outputs": outputs.tolist(),
            "noises": noises.tolist(),
            "end": x.tolist(),
            "x0": x0.tolist(),
        }
    return {"tables": tables, "exact": exact, "trajectories": trajectories}


def noise_cases() -> list[dict[str, Any]]:
    """NumPy's noise of some seeds: the start, and single values of a long run, which reach the rare branches."""
    cases = []
    for seed in (0, 7, 2**32 - 1):
        values = image_rng(seed).standard_normal(200_000, np.float32)
        cases.append(
            {"seed": seed, "count": len(values), "head": values[:64].tolist(), "every_97": values[::97].tolist()}
        )
    return cases


def search_cases() -> dict[str, Any]:
    """A catalog of random vectors: exact scores, int8 codes, mixed queries, and re-ranked scores."""
    rng = np.random.default_rng(2)
    vectors = rng.standard_normal((300, 24)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors[11] = vectors[5]  # equal scores
    gap = ModalityGap(vectors[:64], vectors[64:96].mean(axis=0), vectors[96:99].mean(axis=0))
    codes, scales = quantize_rows(vectors)
    query = vectors[200]
    order = sorted(range(300), key=lambda i: (-float(vectors[i] @ query), i))
    parts = {"text": vectors[100], "image": vectors[101], "like": vectors[102], "unlike": vectors[103]}
    mixes = []
    for names in (("text", "image"), ("text", "like", "unlike"), ("image", "unlike"), ("unlike",), ("text",)):
        chosen = {name: parts[name] for name in names}
        weights = {**WEIGHTS, "text": 0.3}
        mixed = mix(chosen, weights, gap) if len(chosen) > 1 else (-1 if names == ("unlike",) else 1) * chosen[names[0]]
        mixes.append({"parts": {n: v.tolist() for n, v in chosen.items()}, "text_weight": 0.3, "mixed": mixed.tolist()})
    scores, gains = rng.random(8), rng.random(8)
    return {
        "dim": 24,
        "vectors": vectors.tolist(),
        "codes": codes.tolist(),
        "scales": scales.tolist(),
        "query": query.tolist(),
        "order": order[:40],
        "scores": (vectors @ query).tolist(),
        "mixes": mixes,
        "gap": {
            "sample": gap.sample.tolist(),
            "caption_mean": gap.caption_mean.tolist(),
            "neutral_mean": gap.neutral_mean.tolist(),
        },
        "rerank": {
            "scores": scores.tolist(),
            "gains": gains.tolist(),
            "combined": combined_scores(scores, gains, 1.5).tolist(),
        },
        "halves": rng.standard_normal(64).astype(np.float16).view(np.uint16).tolist(),
        "floats": [],
    }


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    bundle = Bundle.open("tiny", threads=1)
    search = search_cases()
    search["floats"] = np.array(search["halves"], np.uint16).view(np.float16).astype(float).tolist()
    cases = {
        "filters": filter_cases(),
        "parsing": parsing_cases(),
        "json": json_cases(),
        "tokens": token_cases(bundle),
        "images": image_cases(),
        "samplers": sampler_cases(bundle),
        "noise": noise_cases(),
        "search": search,
    }
    for name, content in cases.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
