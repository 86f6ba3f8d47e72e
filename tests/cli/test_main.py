"""`unidiff` on the command line, with a toy bundle and the synthetic catalogs."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from support.toy_bundle import make_search_bundle, make_toy_bundle

from unidiff_sdk import Catalog
from unidiff_sdk.catalog.results import Generated, Generation
from unidiff_sdk.cli.console import Group
from unidiff_sdk.cli.generate import _as_list
from unidiff_sdk.cli.main import main
from unidiff_sdk.datasets.synthetic import write_catalog
from unidiff_sdk.errors import FilterError, OptionError, StoreError
from unidiff_sdk.generation.provenance import read_recipe


def run(*arguments: object, columns: int | None = None) -> Result:
    """Run `unidiff` in this process, in a terminal of this width."""
    return CliRunner(catch_exceptions=False).invoke(
        main,
        [str(argument) for argument in arguments],
        terminal_width=columns,
        env={"COLUMNS": str(columns or 80)},
    )


def test_info_says_what_a_bundle_can_do(toy: Path, tmp_path: Path) -> None:
    search = make_search_bundle(tmp_path / "search")
    for folder, purpose in ((toy, "search and generation"), (search, "search only")):
        assert purpose in run("info", folder).stdout
        assert json.loads(run("info", folder, "--json").stdout)["purpose"] == purpose
    Catalog(tmp_path / "shop.catalog", bundle=search).close()
    assert "search only: it has no generator" in run("info", tmp_path / "shop.catalog").stdout
    search.rename(tmp_path / "moved")
    assert json.loads(run("info", tmp_path / "shop.catalog", "--json").stdout)["bundle"]["purpose"] is None


def check_error(result: Result, *says: str, code: int = 1) -> None:
    """One error line on stderr apart from warnings, the exit code, no traceback."""
    lines = [line for line in result.stderr.splitlines() if line.strip() and not line.startswith("Warning:")]
    assert result.exit_code == code, result.output
    assert len(lines) == 1 and lines[0].startswith("Error: "), result.stderr
    for part in says:
        assert part in lines[0]


def check_usage_error(result: Result, *says: str) -> None:
    """The same for an invalid argument."""
    check_error(result, *says, code=2)


@pytest.fixture(scope="session")
def indexed(tmp_path_factory: pytest.TempPathFactory, toy: Path) -> Path:
    """A folder with `products` and `shop.catalog`. Tests that change it use `shop`."""
    root = tmp_path_factory.mktemp("shop")
    result = run("dataset", "fashion-man", root / "products", "--n", 12, "--seed", 3)
    assert result.exit_code == 0, result.output
    assert "12 synthetic products of fashion-man" in result.stdout
    result = run("index", root / "products", root / "shop.catalog", "--bundle", toy)
    assert result.exit_code == 0, result.output
    assert "12 added, 0 unchanged, 0 failed" in result.stdout
    return root


@pytest.fixture
def shop(indexed: Path, tmp_path: Path) -> Path:
    """A copy of `indexed`."""
    return Path(shutil.copytree(indexed, tmp_path / "shop"))


def all_commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The arguments that select each command, the group itself included."""
    yield path
    for name, child in getattr(command, "commands", {}).items():
        yield from all_commands(child, (*path, name))


@pytest.mark.parametrize("path", list(all_commands(main)), ids=" ".join)
def test_help_has_examples_and_fits_80_columns(path: tuple[str, ...]) -> None:
    texts = [run(*path, name, columns=80) for name in ("-h", "--help")]
    assert texts[0].stdout == texts[1].stdout and texts[0].exit_code == 0
    assert "Examples:" in texts[0].stdout
    assert max(map(len, texts[0].stdout.splitlines())) <= 80


def test_help_lists_the_commands_in_order_of_use() -> None:
    text = run("--help").stdout
    places = [
        text.index(f"\n  {name} ")
        for name in (
            "dataset",
            "index",
            "search",
            "duplicates",
            "generate",
            "info",
            "check",
            "delete",
            "reindex",
            "export",
            "restore",
        )
    ]
    assert places == sorted(places)
    assert '  unidiff search shop.catalog "red striped dress" --limit 5' in text


def test_module_runs_as_a_script() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "unidiff_sdk", "info", "nowhere"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: There is no catalog at nowhere")


@pytest.mark.parametrize("script", ["unidiff", "unidiff-train", "unidiff-evaluate", "unidiff-export"])
def test_every_script_has_a_version(script: str) -> None:
    module, _, attribute = entry_points(group="console_scripts")[script].value.partition(":")
    result = CliRunner().invoke(getattr(import_module(module), attribute), ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"unidiff-sdk {version('unidiff-sdk')}\n")


@pytest.mark.parametrize("path", list(all_commands(main)), ids=" ".join)
def test_every_command_has_a_version(path: tuple[str, ...]) -> None:
    result = run(*path, "--version")
    assert (result.exit_code, result.stdout) == (0, f"unidiff-sdk {version('unidiff-sdk')}\n")


@pytest.mark.parametrize("module", ["unidiff_sdk", "unidiff_export"])
def test_packages_run_as_modules(module: str) -> None:
    command = [sys.executable, "-m", module, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"Usage: {module.replace('_', '-').removesuffix('-sdk')} ")


def test_search_prints_a_table_or_json(indexed: Path) -> None:
    result = run("search", indexed / "shop.catalog", "red shirt", "--limit", 3)
    assert result.exit_code == 0, result.output
    assert "3 hits in" in result.stdout
    result = run("search", indexed / "shop.catalog", "red shirt", "--limit", 3, "--offset", 1, "--json")
    page = json.loads(result.stdout)
    assert len(page["hits"]) == 3 and {"id", "score", "text", "payload", "uri"} == page["hits"][0].keys()
    assert (page["offset"], page["limit"]) == (1, 3)
    assert run("search", indexed / "shop.catalog", "red shirt", "--imagine", 2).exit_code == 0


def test_search_by_image_with_a_filter(indexed: Path) -> None:
    image = next((indexed / "products").rglob("*.png"))
    arguments: list[Any] = ["search", indexed / "shop.catalog", "--image", image, "--json"]
    hits = json.loads(run(*arguments).stdout)["hits"]
    assert hits[0]["score"] == pytest.approx(1, abs=1e-4)
    price = hits[0]["payload"]["price"]
    filtered = json.loads(run(*arguments, "--where", json.dumps({"price": {"gt": price}})).stdout)["hits"]
    assert all(hit["payload"]["price"] > price for hit in filtered)
    both = run("search", indexed / "shop.catalog", "red", "--image", image, "--weights", "0.7", "0.3")
    assert both.exit_code == 0


def test_search_by_items_and_pages(indexed: Path) -> None:
    search: list[Any] = ["search", indexed / "shop.catalog"]
    first = json.loads(run(*search, "red shirt", "--limit", 5, "--json").stdout)
    ids = [hit["id"] for hit in first["hits"]]
    second = json.loads(run(*search, "red shirt", "--limit", 5, f"--cursor={first['cursor']}", "--json").stdout)
    assert second["offset"] == 5 and not set(ids) & {hit["id"] for hit in second["hits"]}
    table = run(*search, "red shirt", "--limit", 5)
    assert f"Next page: --cursor={first['cursor']}" in table.stdout
    liked = [hit["id"] for hit in json.loads(run(*search, "--like", ids[0], "--like", ids[1], "--json").stdout)["hits"]]
    assert len(liked) == 10 and not {ids[0], ids[1]} & set(liked)
    brands = json.loads(
        run(*search, "shirt", "--unlike", ids[0], "--without", "red", "--group-by", "brand", "--json").stdout
    )
    assert len({hit["payload"]["brand"] for hit in brands["hits"]}) == len(brands["hits"]) > 1
    assert run(*search, "red", "--hybrid", "--diversity", 0.5).exit_code == 0
    assert run(*search, "red", "--exact", "--json").exit_code == 0
    check_usage_error(run(*search, "red", "--ef", 0), "ef=0: give an integer from 1")
    assert json.loads(run(*search, "red", "--min-score", 2, "--json").stdout)["hits"] == []


def test_ids_can_be_integers_or_strings(tmp_path: Path, toy: Path) -> None:
    from unidiff_sdk import Catalog

    with Catalog(tmp_path / "shop.catalog", toy) as catalog:
        images = [Image.new("RGB", (20, 20), color) for color in ("red", "blue", "lime")]
        catalog.add(images, ids=[7, "8", -9], payloads=[{"catalog": "fashion-man"}] * 3)
    for id, left in (("7", {"8", -9}), ("8", {7, -9}), ("-9", {7, "8"})):
        hits = json.loads(run("search", tmp_path / "shop.catalog", f"--like={id}", "--json").stdout)["hits"]
        assert {hit["id"] for hit in hits} == left
        generate = ("generate", tmp_path / "shop.catalog", "a shirt", "--steps", 2, f"--like={id}", "-o", tmp_path / id)
        assert len(json.loads(run(*generate, "--json").stdout)[0]["like"]) == 64
    check_usage_error(run("search", tmp_path / "shop.catalog", "--like", "99"), "no item '99'")
    assert json.loads(run("delete", tmp_path / "shop.catalog", "007", "7", "--json").stdout) == {
        "removed": 1,
        "items": 2,
    }


def test_search_shows_thumbnails_on_request(indexed: Path) -> None:
    result = run("search", indexed / "shop.catalog", "red shirt", "--limit", 2, "--thumbnails")
    assert result.exit_code == 0, result.output
    assert len(re.findall(r"\x1b\[38;2;[\d;]+m▀", result.stdout)) == 2 * 14 * 7 and "1. 0." in result.stdout
    assert "▀" not in run("search", indexed / "shop.catalog", "red shirt").stdout


def test_control_characters_in_payloads_are_removed(tmp_path: Path, toy: Path) -> None:
    from unidiff_sdk import Catalog

    with Catalog(tmp_path / "shop.catalog", toy) as catalog:
        columns = {"catalog": "fashion-man", "note": "\x1b]0;title\x07"}
        catalog.add(
            Image.new("RGB", (20, 20)), "[bold]red\x1b[2J\n\u202e größe 💡 " + "dress " * 20_000, "\x1b[5m", columns
        )
    for option in ("--thumbnails", "--no-thumbnails"):
        shown = run("search", tmp_path / "shop.catalog", "red", option).stdout
        for control in ("\x1b[2J", "\x1b]0;", "\x1b[5m", "\u202e", "\x07"):
            assert control not in shown
        assert len(shown) < 8_000
        assert "[bold]red" in shown and "größe" in shown and "💡" in shown


def test_duplicates_lists_groups(shop: Path) -> None:
    images = sorted((shop / "products").rglob("*.png"))
    copies = shop / "copies"
    copies.mkdir()
    shutil.copy(images[0], copies / "copy.png")
    (copies / "metadata.jsonl").write_text('{"file_name": "copy.png", "text": "a copy", "id": "copy"}\n')
    assert run("index", copies, shop / "shop.catalog").exit_code == 0
    groups = json.loads(run("duplicates", shop / "shop.catalog", "--threshold", "0.9999999", "--json").stdout)
    (group,) = [group for group in groups if "copy" in {hit["id"] for hit in group}]
    assert len(group) >= 2 and group[0]["score"] == pytest.approx(1, abs=1e-4)
    table = run("duplicates", shop / "shop.catalog", "--threshold", "0.9999999", "--limit", 1)
    assert "Found 1 group with 2 items" in table.stdout and "a cosine similarity of 1 or more" in table.stdout
    check_usage_error(run("duplicates", shop / "shop.catalog", "--threshold", "2"), "threshold=2.0")


def test_index_skips_unchanged_rows_and_reports_invalid_ones(shop: Path) -> None:
    with (shop / "products" / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "nowhere.png", "text": "[bold]x[/bold]"}\n')
    result = run("index", shop / "products", shop / "shop.catalog")
    assert result.exit_code == 0, result.output
    assert "0 added, 12 unchanged, 1 failed" in result.stdout
    assert "nowhere.png" in result.stdout and "no such image" in result.stdout
    report = json.loads(run("index", shop / "products", shop / "shop.catalog", "--json").stdout)
    assert (report["skipped"], report["failed"][0]["line"], report["items"]) == (12, 13, 12)
    check_error(run("index", shop / "products", shop / "shop.catalog", "--strict"), "line 13", "no such image")


def test_index_prunes_and_accepts_tables(shop: Path) -> None:
    lines = (shop / "products" / "metadata.jsonl").read_text().splitlines()
    (shop / "products" / "metadata.jsonl").write_text("\n".join(lines[:9]) + "\n")
    report = json.loads(run("index", shop / "products", shop / "shop.catalog", "--prune", "--json").stdout)
    assert (report["skipped"], report["removed"], report["items"]) == (9, 3, 9)
    (shop / "spring.jsonl").write_text("\n".join(lines[9:]) + "\n")
    result = run("index", shop / "spring.jsonl", shop / "shop.catalog", "--images", shop / "products")
    assert result.exit_code == 0 and "3 added" in result.stdout and "12 items" in result.stdout
    check_usage_error(
        run("index", shop / "products", shop / "shop.catalog", "--images", shop), "--images needs a table"
    )


def test_generate_writes_images_with_their_recipes(shop: Path, toy: Path) -> None:
    arguments = ["generate", shop / "shop.catalog", "red boots", "-n", 2, "--seed", 7, "--steps", 2]
    result = run(*arguments, "-o", shop / "out", "--add")
    assert result.exit_code == 0, result.output
    assert "Kept 2 of 2 generated images in" in result.stdout and "Seed 7, 2 steps, sampler ddim" in result.stdout
    images = sorted((shop / "out").glob("0*.png"))
    assert len(images) == 2 and Image.open(images[0]).size == (16, 16)
    assert read_recipe(images[0]).arguments["prompt"] == "red boots"
    assert Image.open(shop / "out" / "contact-sheet.png").width > 2 * 256
    recipe = json.loads((shop / "out" / "generation.json").read_text())
    assert {image["seed"] for image in recipe} == {7, 8}
    assert recipe[0]["score"] >= recipe[1]["score"] and recipe[0]["nearest"]["text"]
    assert json.loads(run("info", shop / "shop.catalog", "--json").stdout)["items"] == 14
    alone = run("generate", "red boots", "--bundle", toy, "-o", shop / "alone", "--steps", 2, "--seed", 7, "--json")
    assert json.loads(alone.stdout)[0]["nearest"] is None


def test_generation_json_has_the_arguments_of_each_image() -> None:
    recipe = {
        "prompt": "rote Stiefel", "negative_prompt": "", "seed": 7, "steps": 2, "guidance_scale": 1.0,
        "guidance_rescale": 0.0, "sampler": "ddim", "long_prompts": "truncate", "lora": {"light": 0.123456789},
    }  # fmt: skip
    image = Generated(image=Image.new("RGB", (8, 8)), score=0.5, nearest=None, bundle="f" * 64, **recipe)
    (described,) = _as_list(Generation((image,), 1.0, 1, {}), [Path("a.png")])
    assert {name: described[name] for name in recipe} == recipe and described["generated"]


def test_generate_starts_from_an_item_with_a_mask(shop: Path) -> None:
    first = json.loads(run("search", shop / "shop.catalog", "red", "--json").stdout)["hits"][0]["id"]
    mask = Image.new("L", (16, 16))
    mask.paste(255, (0, 0, 8, 16))
    mask.save(shop / "mask.png")
    arguments = ["generate", shop / "shop.catalog", "red boots", "--steps", 3, "--seed", 1, "--like", first]
    result = run(*arguments, "--mask", shop / "mask.png", "-o", shop / "inpainted", "--json")
    made = json.loads(result.stdout)[0]
    assert made["strength"] == 1.0 and len(made["like"]) == len(made["mask"]) == 64
    result = run(*arguments, "--strength", "0.7", "--best-of", 3, "-n", 2, "-o", shop / "varied")
    assert "Kept 2 of 3 generated images in" in result.stdout
    check_usage_error(run("generate", "x", "--like", "nobody", "-o", shop / "none"), "--like nobody is neither")
    result = run(*arguments, "--min-score", 1, "-o", shop / "none", "--json")
    check_error(result, "No image was written: 4 candidates rejected")
    assert "4 scored below min_score=1.0" in result.stderr and not (shop / "none").exists()


def test_info_and_delete_report_the_items(shop: Path) -> None:
    result = run("info", shop / "shop.catalog")
    assert "12 items" in result.stdout and "Bundle:  toy" in result.stdout
    assert re.search(r"column +type", result.stdout) and re.search(r"price +number", result.stdout)
    first = json.loads(run("search", shop / "shop.catalog", "red", "--json").stdout)["hits"][0]["id"]
    assert "1 item deleted" in run("delete", shop / "shop.catalog", first, "nobody").stdout
    assert json.loads(run("delete", shop / "shop.catalog", first, "--json").stdout) == {"removed": 0, "items": 11}


def test_reindex_encodes_all_items_once(shop: Path) -> None:
    other = make_toy_bundle(shop / "other", seed=1)
    assert "12 items encoded with" in run("reindex", shop / "shop.catalog", other).stdout
    assert "already uses" in run("reindex", shop / "shop.catalog", other).stdout
    assert json.loads(run("reindex", shop / "shop.catalog", other, "--json").stdout) == {"reindexed": 0}
    assert run("search", shop / "shop.catalog", "red").exit_code == 0


def test_export_and_restore_keep_all_items(shop: Path, toy: Path) -> None:
    file, new = shop / "shop.parquet", shop / "new.catalog"
    result = run("export", shop / "shop.catalog", file)
    assert result.exit_code == 0, result.output
    assert "12 items written to" in result.stdout and " MB)" in result.stdout
    assert "has 12 items" in run("restore", file, new).stdout
    assert json.loads(run("info", new, "--json").stdout)["items"] == 12
    check_error(run("export", new, file), "is an earlier export", "--overwrite")
    cheap = ["--where", '{"price": {"lt": 40}}', "--overwrite", "--json"]
    shirts = json.loads(run("export", new, file, *cheap).stdout)
    assert 0 < shirts["items"] < 12 and shirts["bytes"] == file.stat().st_size
    other = make_toy_bundle(shop / "other", seed=1)
    check_error(run("restore", file, shop / "more", "--bundle", other), "is another bundle", "reencode")
    again = json.loads(run("restore", file, shop / "more", "--bundle", other, "--reencode", "--json").stdout)
    assert again == {"items": shirts["items"]}
    check_error(run("restore", file, new), "There is a catalog at")
    check_error(run("restore", shop / "nowhere.parquet", shop / "none"), "nowhere.parquet")


# ------------------------------------------------------------------------------------------------ errors


def test_invalid_arguments_print_one_line(indexed: Path, toy: Path, tmp_path: Path) -> None:
    catalog = indexed / "shop.catalog"
    check_error(run("search", tmp_path / "none", "x"), "There is no catalog at", "unidiff index")
    assert not (tmp_path / "none").exists()
    check_usage_error(run("search", catalog), "The query is empty")
    check_usage_error(run("search", catalog, "x", "--where", "{price"), "--where is not valid JSON")
    check_usage_error(run("search", catalog, "x", "--where", '{"price": {"below": 3}}'), "Valid operators")
    check_usage_error(run("search", catalog, "x", "--where", "[1]"), "A filter is a dictionary")
    check_usage_error(run("search", catalog, "x", "--limit", 0), "limit=0")
    check_error(run("search", catalog, "--image", tmp_path / "none.png"), "none.png")
    check_error(run("index", tmp_path / "none", tmp_path / "new", "--bundle", toy), "no such folder")
    assert not (tmp_path / "new").exists()
    check_error(run("index", indexed / "products", tmp_path / "new", "--bundle", tmp_path / "none"), "no such folder")
    assert not (tmp_path / "new").exists()
    check_usage_error(run("generate", catalog, "red", "--steps", 0, "-o", tmp_path / "out"), "steps")
    check_usage_error(run("generate", catalog, "red", "--sampler", "magic", "-o", tmp_path / "out"), "magic")
    check_usage_error(run("generate", "red", "--add", "--bundle", toy, "-o", tmp_path / "out"), "--add")
    check_usage_error(run("generate", catalog, "red", "boots", "-o", tmp_path / "out"), "in quotes")
    check_usage_error(run("dataset", "fashion-cat", tmp_path / "cats"), "fashion-cat")
    check_error(run("search", toy, "red"), "is not a catalog")
    assert json.loads(run("info", catalog, "--json").stdout)["items"] == 12


def test_search_in_an_empty_catalog_is_an_error(tmp_path: Path, toy: Path) -> None:
    from unidiff_sdk import Catalog

    Catalog(tmp_path / "shop.catalog", toy).close()
    check_error(run("search", tmp_path / "shop.catalog", "x"), "is empty", "unidiff index")


def test_index_without_a_valid_row_is_an_error(tmp_path: Path, toy: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "x.png"}\n')
    result = run("index", tmp_path, tmp_path.parent / "shop.catalog", "--bundle", toy)
    check_error(result, "no valid row: 1 row invalid")


def test_changed_bundle_is_an_error_and_nothing_is_lost(shop: Path, toy: Path) -> None:
    bundle = Path(shutil.copytree(toy, shop / "bundle"))
    other = make_toy_bundle(shop / "other", seed=1)
    index = ("index", shop / "products", shop / "shop.catalog", "--bundle")
    check_error(run(*index, other), "is another bundle", "reindex")
    graph = bundle / "image_encoder" / "model.onnx"
    data = bytearray(graph.read_bytes())
    data[-1] ^= 1
    graph.write_bytes(bytes(data))
    check_error(run(*index, bundle), "model.onnx", "changed")
    assert json.loads(run("info", shop / "shop.catalog", "--json").stdout)["items"] == 12


def test_catalog_in_use_is_an_error(shop: Path) -> None:
    from unidiff_sdk import Catalog

    with Catalog(shop / "shop.catalog"):
        check_error(run("search", shop / "shop.catalog", "x"), "in use")


def test_photographs_give_a_warning(tmp_path: Path, toy: Path) -> None:
    Image.new("RGB", (20, 20), "red").save(tmp_path / "x.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "x.png", "text": "a real photograph"}\n')
    result = run("index", tmp_path, tmp_path / "shop.catalog", "--bundle", toy)
    assert result.exit_code == 0
    assert result.stderr.startswith("Warning: ") and "synthetic" in result.stderr


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (StoreError("two\n lines"), 1, "Error: two lines"),
        (OptionError("n is 0"), 2, "Error: n is 0"),
        (FilterError("no operator"), 2, "Error: no operator"),
        (KeyboardInterrupt(), 130, "Interrupted. Run it again."),
        (KeyboardInterrupt(signal.SIGTERM), 143, "Interrupted. Run it again."),
    ],
)
def test_errors_and_interrupts_print_one_line(raised: BaseException, code: int, line: str) -> None:
    @click.group(cls=Group)
    def tool() -> None:
        """A tool."""

    @tool.command(resuming="Run it again.")
    def fail() -> None:
        """Fail."""
        raise raised

    result = CliRunner().invoke(tool, ["fail"])
    assert (result.exit_code, result.stderr.strip()) == (code, line)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_index_that_was_interrupted_says_how_to_continue(
    tmp_path: Path, toy: Path, number: signal.Signals, code: int
) -> None:
    write_catalog("fashion-man", tmp_path / "products", n=400)
    command = [sys.executable, "-m", "unidiff_sdk", "index", "products", "shop.catalog", "--bundle", str(toy)]
    with subprocess.Popen(
        command,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # A shell starts jobs in the background with SIGINT ignored, and processes inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        while process.poll() is None and not list(tmp_path.glob("shop.catalog/images/*/*")):
            time.sleep(0.01)
        process.send_signal(number)
        _, stderr = process.communicate()
    last = stderr.decode().splitlines()[-1]
    assert (process.returncode, last) == (
        code,
        "Interrupted. The items added so far are kept. Run the same command again to add the others.",
    )
    assert "0 failed" in run("index", tmp_path / "products", tmp_path / "shop.catalog").stdout


def test_index_reports_equal_problems_once_and_fails_if_most_rows_are_invalid(toy: Path, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    rows = [{"photo": "0.png", "title": "a"}, *({"photo": f"{n}.png", "title": "b"} for n in range(1, 300))]
    table = tmp_path / "spring.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    catalog = tmp_path / "shop.catalog"
    result = run("index", table, catalog, "--bundle", toy, "--columns", "image=photo,text=title")
    assert result.exit_code == 1 and "has only 1 valid row: 299 rows invalid" in result.stderr
    assert result.stdout.count("there is no such image file") == 1 and "299" in result.stdout
    assert Catalog(catalog).count() == 1, "what is valid stays stored"
    assert "'photo'" in run("index", table, catalog, "--columns", "image=foto").stdout
    assert run("index", table, catalog, "--columns", "photo").exit_code == 2
    tsv = tmp_path / "bad.csv"
    tsv.write_text("photo,title\n0.png,a\n")
    check_error(run("index", tsv, tmp_path / "new.catalog", "--bundle", toy), "--columns image=photo")
    assert not (tmp_path / "new.catalog").exists()


def test_search_fits_80_columns_and_shows_the_columns_of_the_filter(tmp_path: Path, toy: Path) -> None:
    with Catalog(tmp_path / "shop.catalog", toy) as catalog:
        id = "0b9d6b5c-3b0e-4a53-9f29-1f7a2f0a0001"
        columns = {"catalog": "fashion-man", "price": 39.5, "size": {"waist": 32}, "brand": "Acme", "note": "n" * 400}
        images = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
        catalog.add(images, ["a long caption " * 30, "short"], [id, 2], [columns] * 2)
    search = ["search", tmp_path / "shop.catalog", "red"]
    shown = run(*search, columns=80).stdout
    assert max(map(len, shown.splitlines())) <= 80 and id in re.sub(r"\s", "", re.sub("  [a-z ]+…", "", shown))
    assert shown.count("a long caption a long") == 1 and "brand" not in shown
    assert re.search(r"id +caption +columns", run(*search, columns=160).stdout)
    where = json.dumps({"price": {"lt": 80}, "size.waist": [32]})
    shown = run(*search, "--where", where, columns=80).stdout
    assert max(map(len, shown.splitlines())) <= 80
    assert re.search(r"score +id +price +size\.waist +caption", shown) and re.search(r"2 +39\.5 +32 +short", shown)
    assert re.search(r"id +brand +caption", run(*search, "--group-by", "brand", columns=80).stdout)


def test_options_without_effect_are_usage_errors(indexed: Path, toy: Path, tmp_path: Path) -> None:
    catalog, out = indexed / "shop.catalog", ("-o", tmp_path / "out")
    check_usage_error(run("search", catalog, "red", "--json", "--thumbnails"), "--thumbnails has no effect with --json")
    check_usage_error(run("search", catalog, "red", "--weights", 0.5, 0.5), "names image, which the query")
    check_usage_error(run("search", catalog, "red", "--group-by", "brnd"), "no item has this column", "brand")
    check_usage_error(run("search", catalog, "--without", "red", "--hybrid"), "hybrid= ranks by the words")
    check_usage_error(run("duplicates", catalog, "--json", "--limit", 3), "--limit has no effect with --json")
    check_usage_error(run("generate", "red", "--bundle", toy, "--max-similarity", 0.9, *out), "without a CATALOG")
    for option in (("--budget", 9), ("--strength", 0.5), ("--mask", "mask.png"), ("--rescale", 0.5, "--guidance", 1)):
        result = run("generate", catalog, "red", *option, *out)
        check_usage_error(result)
    (tmp_path / "file").touch()
    check_usage_error(run("generate", "red", "--bundle", toy, "-o", tmp_path / "file" / "x"), "--out", "not writable")
    assert not (tmp_path / "out").exists()
