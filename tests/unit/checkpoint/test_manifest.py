"""What a checkpoint says about itself, where it lies, and when it fits a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_kvshare.checkpoint import folder
from megatron_kvshare.checkpoint.load import chosen, find_checkpoint, newest_sound
from megatron_kvshare.checkpoint.manifest import (
    FORMAT_VERSION,
    Manifest,
    NewerFormat,
    Progress,
    check_data,
    read_manifest,
    tokens_after_move,
)
from megatron_kvshare.config import CheckpointConfig, ModelConfig
from megatron_kvshare.errors import CheckpointError
from megatron_kvshare.sharing.patterns import build_map
from megatron_kvshare.sharing.solver import RECIPES, Recipe
from megatron_kvshare.spec.model_spec import ModelSpec


def identity_of(**changes: Any) -> dict[str, Any]:
    kv_map = changes.pop("kv_map", "0_2_2")
    tokenizer = changes.pop("tokenizer", "abc")
    vocab_size = changes.pop("vocab_size", 100)
    recipe = changes.pop("recipe", RECIPES["paper"])
    model = ModelConfig(num_layers=3, **changes)
    spec = ModelSpec(
        model=model,
        map=build_map(3, kv_map=kv_map),
        recipe=recipe,
        vocab_size=vocab_size,
        tokenizer=tokenizer,
    )
    return spec.identity


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    aside = folder.begin(folder.iteration_folder(tmp_path, 7))
    Manifest(identity_of(), Progress(7, 56, 560, 1), 1, 2, True).write(aside)
    folder.publish(aside, folder.iteration_folder(tmp_path, 7), 7)
    return tmp_path


def find(root: Path, run: dict[str, Any], **settings: Any) -> Any:
    config = CheckpointConfig(load=str(root), **settings)
    found = folder.candidates(root).iterations
    return find_checkpoint(config, run, 2, found[0] if found else None)


def test_round_trip(saved: Path) -> None:
    assert folder.latest_iteration(saved) == 7
    manifest = read_manifest(folder.iteration_folder(saved, 7))
    assert manifest == Manifest(identity_of(), Progress(7, 56, 560, 1), 1, 2, True)
    assert not list(saved.glob("*.partial"))


def test_publishing_again_replaces(saved: Path) -> None:
    target = folder.iteration_folder(saved, 7)
    aside = folder.begin(target)
    Manifest(identity_of(), Progress(7, 1, 1), 1, 1, False).write(aside)
    folder.publish(aside, target, 7)
    assert read_manifest(target).progress.samples == 1
    assert sorted(path.name for path in saved.iterdir()) == [target.name, folder.TRACKER]


def test_what_is_taken(saved: Path) -> None:
    found = find(saved, identity_of())
    assert found.progress.step == 7 and found.take_optimizer and found.take_random_state
    found = find(saved, identity_of(), no_load_optim=True, no_load_rng=True)
    assert found.progress.step == 7
    assert not found.take_optimizer and not found.take_random_state
    found = find(saved, identity_of(tokenizer="other", rotary_base=5e5), finetune=True)
    assert found.progress == Progress() and not found.take_optimizer


def test_loading_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint.*write --resume auto"):
        find(tmp_path, identity_of(), save=str(tmp_path))
    with pytest.raises(CheckpointError, match=r"no checkpoint.*drop --load"):
        find(tmp_path, identity_of())


@pytest.mark.parametrize("holds", [False, True], ids=["new", "old"])
def test_resume_auto_goes_on_or_starts_where_load_says(holds, saved, tmp_path, single) -> None:
    save = saved if holds else tmp_path / "new"
    given = CheckpointConfig(save=str(save), load="pretrained", resume="auto", finetune=True)
    taken = chosen(given, single)
    assert (taken.load, taken.finetune) == ((str(saved), False) if holds else ("pretrained", True))


@pytest.mark.parametrize("more", [{}, {"load": "elsewhere"}, {"load": "", "finetune": True}])
def test_a_run_does_not_write_over_another(more, saved: Path, tmp_path: Path, single) -> None:
    if more.get("load") == "":
        more = {**more, "load": str(saved)}
    with pytest.raises(CheckpointError, match=r"--save.*write over.*--resume auto"):
        chosen(CheckpointConfig(save=str(saved), **more), single)
    free = CheckpointConfig(save=str(tmp_path / "new"), **more)
    assert chosen(free, single) is free
    same = CheckpointConfig(save=str(saved), load=str(saved))
    assert chosen(same, single) is same


DATA = {
    "seed": 1,
    "seq_length": 64,
    "train": [{"source": "a", "fingerprint": "f1", "documents": [0, 9], "weight": 1.0}],
}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"seed": 2}, "seed was 1, now 2"),
        ({"seq_length": 32}, "seq_length was 64, now 32"),
        ({"train": [DATA["train"][0] | {"fingerprint": "f2"}]}, "fingerprint f2"),
        ({"train": [DATA["train"][0] | {"documents": [0, 8]}]}, "documents 0 to 8"),
        ({"train": [DATA["train"][0] | {"weight": 0.5}] * 2}, "0.5 x a"),
    ],
)
def test_other_data_is_refused_unless_it_is_meant(change: dict, told: str) -> None:
    stored = Manifest({}, Progress(), 1, 1, None, data=DATA)
    with pytest.raises(CheckpointError) as caught:
        check_data(stored, DATA | change, CheckpointConfig(load="x"))
    assert told in str(caught.value) and "--data-change-ok" in str(caught.value)
    (accepted,) = check_data(stored, DATA | change, CheckpointConfig(data_change_ok=True))
    assert told in accepted
    assert check_data(stored, DATA | change, CheckpointConfig(finetune=True)) == []


def test_moved_data_and_an_evaluation_turned_on_are_no_change() -> None:
    stored = Manifest({}, Progress(), 1, 1, None, data=DATA)
    run = DATA | {"train": [DATA["train"][0] | {"source": "b"}], "valid": []}
    assert check_data(stored, run, CheckpointConfig()) == []


def stage(first_sample: int, **changes: object) -> dict:
    return {"first_sample": first_sample, "train": [DATA["train"][0] | changes]}


@pytest.mark.parametrize(
    ("stored", "run", "told"),
    [
        ({}, {"stages": [stage(64)]}, "stages was none, now from sample 64 on 1 x a"),
        ({"stages": []}, {"stages": [stage(64)]}, "stages was none, now from sample 64"),
        ({"stages": [stage(64)]}, {"stages": []}, "now none"),
        ({"stages": [stage(64)]}, {"stages": [stage(128)]}, "from sample 128"),
        (
            {"stages": [stage(64)]},
            {"stages": [stage(64, fingerprint="f2")]},
            "fingerprint f2",
        ),
        ({"stages": [stage(64)]}, {"stages": [stage(64), stage(80)]}, "and from sample 80"),
    ],
)
def test_other_stages_are_other_data(stored: dict, run: dict, told: str) -> None:
    """A checkpoint that knows no stages had none."""
    manifest = Manifest({}, Progress(), 1, 1, True, data=DATA | stored)
    with pytest.raises(CheckpointError) as caught:
        check_data(manifest, DATA | run, CheckpointConfig(load="x"))
    assert told in str(caught.value)


def test_the_same_stages_are_no_change() -> None:
    moved = DATA | {"stages": [stage(64, source="b", index_sha256="i")]}
    manifest = Manifest({}, Progress(), 1, 1, True, data=DATA | {"stages": [stage(64)]})
    assert check_data(manifest, moved, CheckpointConfig()) == []
    older = Manifest({}, Progress(), 1, 1, True, data=DATA)
    assert check_data(older, DATA | {"stages": []}, CheckpointConfig()) == []
    assert check_data(Manifest({}, Progress(), 1, 1, True), moved, CheckpointConfig()) == []


def test_tokens_follow_data_that_was_moved() -> None:
    stored = DATA | {"stages": [stage(64, source="b", fingerprint="f2")]}
    run = DATA | {
        "train": [DATA["train"][0] | {"source": "new/a"}],
        "stages": [stage(64, source="new/b", fingerprint="f2")],
    }
    tokens = {"a": 5, "b": 7, "gone": 1}
    assert tokens_after_move(tokens, stored, run) == {"new/a": 5, "new/b": 7, "gone": 1}
    assert tokens_after_move(tokens, stored, stored) == tokens
    assert tokens_after_move(tokens, {}, run) == tokens


def test_the_index_counts_where_the_checkpoint_knows_it() -> None:
    """Checkpoints before it knew the lengths of the documents and the tokens."""
    older = Manifest({}, Progress(), 1, 1, None, data=DATA)
    run = DATA | {"train": [DATA["train"][0] | {"index_sha256": "i" * 64}]}
    assert check_data(older, run, CheckpointConfig()) == []
    newer = Manifest({}, Progress(), 1, 1, None, data=run)
    assert check_data(newer, run, CheckpointConfig()) == []
    other = DATA | {"train": [run["train"][0] | {"index_sha256": "j" * 64}]}
    with pytest.raises(CheckpointError, match=r"index iiiiiiii\), now .*index jjjjjjjj"):
        check_data(newer, other, CheckpointConfig(load="x"))


def test_every_difference_is_listed(saved: Path) -> None:
    run = identity_of(kv_map="0_1_1", hidden_size=1024, vocab_size=99, tokenizer="other")
    with pytest.raises(CheckpointError) as caught:
        find(saved, run)
    named = {fault.where for fault in caught.value.faults}
    assert {"--kv-map", "--hidden-size", "--vocab-size", "tokenizer"} <= named
    with pytest.raises(CheckpointError, match="kv-map"):
        find(saved, run, finetune=True)


def test_another_recipe_is_refused_and_finetuning_may_change_it(saved: Path) -> None:
    run = identity_of(recipe=RECIPES["two-sweep"])
    with pytest.raises(
        CheckpointError, match=r"two-sweep: strided\(4; 1, 1\)p.*paper: jacobi\(7, 2\)"
    ):
        find(saved, run)
    assert find(saved, run, finetune=True) is not None


def test_a_map_without_sweeps_has_no_recipe() -> None:
    names = ("two-sweep", "paper")
    first, second = (identity_of(kv_map="0_0_0", recipe=RECIPES[name]) for name in names)
    assert first == second and first["kv_recipe"] is None


def test_the_stored_recipe_can_be_built_again(saved: Path) -> None:
    stored = read_manifest(folder.iteration_folder(saved, 7)).identity["kv_recipe"]
    assert Recipe.from_dict(stored) == RECIPES["paper"]


LATER = str(FORMAT_VERSION + 1)


@pytest.mark.parametrize("version", [LATER, "3", "NaN", "8.0", "true", "-1", "1e999", '"8"', "[8]"])
def test_a_version_that_was_not_written_is_damage(saved: Path, version: str) -> None:
    """Not a newer program's checkpoint, and not one too old for a checksum."""
    path = folder.iteration_folder(saved, 7) / "kvshare.json"
    text = path.read_text()
    path.write_text(
        text.replace(f'"format_version": {FORMAT_VERSION}', f'"format_version": {version}')
    )
    assert path.read_text() != text
    with pytest.raises(CheckpointError, match="not a complete checkpoint") as caught:
        read_manifest(path.parent)
    assert not isinstance(caught.value, NewerFormat)


def test_a_later_version_is_told_from_damage_by_its_checksum(saved: Path, single) -> None:
    aside = folder.begin(folder.iteration_folder(saved, 9))
    later = Manifest(identity_of(), Progress(9), 1, 2, True, format_version=FORMAT_VERSION + 1)
    later.write(aside)
    folder.publish(aside, folder.iteration_folder(saved, 9), 9)
    settings = CheckpointConfig(load=str(saved))
    with pytest.raises(NewerFormat, match="update megatron_kvshare"):
        newest_sound(settings, single)
    path = folder.iteration_folder(saved, 9) / "kvshare.json"
    path.write_text(path.read_text().replace('"samples": 0', '"samples": 1'))
    found = newest_sound(settings, single)
    assert found.iteration == 7 and "iter_0000009" in "".join(found.warnings)


NO_MANIFESTS = {
    "list": "[]",
    "number": "7",
    "null": "null",
    "deep": "[" * 100_000,
    "version alone": '{"format_version": 1}',
}


@pytest.mark.parametrize("text", NO_MANIFESTS.values(), ids=NO_MANIFESTS)
def test_what_is_no_manifest_is_damage(saved: Path, text: str) -> None:
    path = folder.iteration_folder(saved, 7) / "kvshare.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        read_manifest(path.parent)


@pytest.mark.parametrize("name", ["../other", "/etc/passwd", "a/b", ".."])
def test_a_manifest_names_files_of_its_own_folder_only(saved: Path, name: str) -> None:
    target = folder.iteration_folder(saved, 7)
    marks = {name: {"bytes": 1, "sha256": "0"}}
    Manifest(identity_of(), Progress(7), 1, 2, True, files=marks).write(target)
    with pytest.raises(CheckpointError, match="outside its folder"):
        read_manifest(target)


def write_old(manifest: Manifest, aside: Path) -> None:
    """Versions before 6 named the kind of optimizer, those before 4 had no checksum."""
    manifest.write(aside)
    path = aside / "kvshare.json"
    values = json.loads(path.read_text())
    del values["has_optimizer"], values["sha256"]
    path.write_text(json.dumps({**values, "optimizer_format": "replicated fp32"}))


@pytest.mark.parametrize("kv_map", ["0_2_2", "0_0_0"])
def test_version_1_had_the_published_passes(tmp_path: Path, kv_map: str) -> None:
    old = identity_of(kv_map=kv_map)
    del old["kv_recipe"]
    config = {"kv_forward_passes": 1, "kv_backward_passes": 2}
    aside = folder.begin(folder.iteration_folder(tmp_path, 7))
    write_old(Manifest(old, Progress(7), 1, 2, True, config, format_version=1), aside)
    folder.publish(aside, folder.iteration_folder(tmp_path, 7), 7)
    published = Recipe(forward_sweeps=1, backward_sweeps=2)
    assert find(tmp_path, identity_of(kv_map=kv_map, recipe=published)) is not None
    if kv_map == "0_2_2":
        with pytest.raises(CheckpointError, match=r"jacobi\(1, 2\)"):
            find(tmp_path, identity_of(kv_map=kv_map))


def test_earlier_names_of_parts_are_no_difference(tmp_path: Path) -> None:
    old = identity_of()
    parts = old["kv_recipe"].items()
    old["kv_recipe"] = {name.replace("_sweeps", "_passes"): value for name, value in parts}
    assert old != identity_of()
    aside = folder.begin(folder.iteration_folder(tmp_path, 7))
    Manifest(old, Progress(7), 1, 2, True).write(aside)
    folder.publish(aside, folder.iteration_folder(tmp_path, 7), 7)
    assert find(tmp_path, identity_of()).manifest.identity == identity_of()


def test_an_unknown_tokenizer_is_not_a_difference(saved: Path) -> None:
    assert find(saved, identity_of(tokenizer=None)) is not None


def test_a_checkpoint_without_optimizer_state_must_be_asked_for(tmp_path: Path) -> None:
    aside = folder.begin(folder.iteration_folder(tmp_path, 7))
    Manifest(identity_of(), Progress(7), 1, 2, False).write(aside)
    folder.publish(aside, folder.iteration_folder(tmp_path, 7), 7)
    with pytest.raises(CheckpointError, match="no-load-optim"):
        find(tmp_path, identity_of())
    assert not find(tmp_path, identity_of(), no_load_optim=True).take_optimizer
