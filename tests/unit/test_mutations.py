"""The damaged files that other tests read are damaged, and the same in every run."""

from __future__ import annotations

import json

from tests.mutations import mutations, text_mutations

TEXT = json.dumps({"a": 1, "b": [1, 2.5, {"c": "x"}], "d": None}, indent=1)


def test_mutations_differ_from_the_original_and_do_not_depend_on_the_run():
    original = bytes(range(200))
    made = list(mutations(original, 300, seed=3))
    assert len(made) == 300 and made == list(mutations(original, 300, seed=3))
    assert all(changed != original for _, changed in made)
    assert len({changed for _, changed in made}) > 250
    assert made != list(mutations(original, 300, seed=4))
    assert all(changed for _, changed in mutations(b"", 20, seed=0))


def test_changed_texts_reach_structure_and_letters():
    made = list(text_mutations(TEXT, 400, seed=5))
    assert len(made) == 400 and made == list(text_mutations(TEXT, 400, seed=5))
    assert all(changed != TEXT for _, changed in made)
    pairs: list[list[tuple[str, object]]] = []
    broken = 0
    for _, changed in made:
        try:
            json.loads(changed, object_pairs_hook=lambda found: pairs.append(found) or dict(found))
        except ValueError:
            broken += 1
    assert 20 < broken < 200
    assert any(len(dict(found)) < len(found) for found in pairs), "no key twice"
    assert any(key not in "abcd" for found in pairs for key, _ in found), "no other key"
    assert any(value != value for found in pairs for _, value in found), "no NaN"


def test_text_that_is_not_json_is_changed_letter_by_letter():
    assert all(changed != "12 a" for _, changed in text_mutations("12 a", 50, seed=1))
