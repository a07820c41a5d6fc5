"""Numbers are read once: what was checked is what libraries get, and they can hold it."""

from __future__ import annotations

import numpy
import pytest
import torch
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from pydantic import TypeAdapter, ValidationError

from megatron_kvshare.config.blend import parse_blend, parse_split
from megatron_kvshare.config.fields.types import Bytes, Count, Index, Layers, Minutes, Seconds, Seed
from megatron_kvshare.config.pretrain import parse_pretrain
from megatron_kvshare.errors import ConfigError
from megatron_kvshare.megatron_api.datasets import DataPart, split_ranges
from megatron_kvshare.sharing.patterns import build_map
from megatron_kvshare.stages.layout import parse_layout

MOCK = "--mock-data --vocab-size 100 --num-layers 4 --hidden-size 64 --num-attention-heads 4"


@pytest.mark.parametrize(
    ("split", "shares"),
    [
        ("969,30,1", (969, 30, 1)),
        ("1e2,1", (100, 1)),
        ("1E+2, .5 ,0", (100, 0.5, 0)),
        ("+9.,1", (9, 1)),
        ("1", (1,)),
        ("1e300,1", (1e300, 1)),
    ],
)
def test_splits(split: str, shares: tuple[float, ...]) -> None:
    assert parse_split(split) == shares


@pytest.mark.parametrize("number", [1, 7, 100, 12_345])
@pytest.mark.parametrize("split", ["969,30,1", "98,2,0", "1", "0.5,.25,0.25", "3,3,3"])
def test_splits_mean_what_megatron_reads(split: str, number: int) -> None:
    """Where it reads them right: digits and points."""
    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    found = split_ranges(parse_split(split), number)
    for part in DataPart:
        first, end = matrix[part] or (0.0, 0.0)
        assert found[part] == (round(first * number), round(end * number))


def test_an_exponent_is_part_of_its_number() -> None:
    """megatron-core reads 1e2,1 as 1, 2 and 1."""
    ranges = split_ranges(parse_split("1e2,1"), 101)
    assert ranges == {DataPart.train: (0, 100), DataPart.valid: (100, 101), DataPart.test: (0, 0)}


@pytest.mark.parametrize(
    "split",
    ["1_000,1", "٣,1", "１,1", "0x10,1", "1e308,1e308", "inf,1", "nan,1", "1,nan", "1,-1", "-0,1",
     "1,,1", "", ",", "1 2", "1;2", "1e999", "1e2e2", "--1", "1,2,3,0"],
)  # fmt: skip
def test_other_spellings_of_splits_are_refused(split: str) -> None:
    with pytest.raises(ConfigError, match="--split"):
        parse_split(split)


@pytest.mark.parametrize(
    ("words", "weights"),
    [
        ("a", (None,)),
        ("2024_a 1_000 ٣", (None, None, None)),
        ("1 a", (1,)),
        ("0.7 a 0.3 b", (0.7, 0.3)),
        ("1e3 a 5e2 b", (1000, 500)),
        ("1e300 a 1e300 b", (1e300, 1e300)),
        ("1e-320 a 1e-320 b", (1e-320, 1e-320)),
        ("1 a 2e-6 b", (1, 2e-6)),
    ],
)
def test_blends(words: str, weights: tuple[float | None, ...]) -> None:
    assert tuple(weight for _, weight in parse_blend("--data-path", words.split())) == weights


@pytest.mark.parametrize(
    "words",
    ["1e308 a 1e308 b", "1 a 1e-9 b", "1e300 a 1 b", "inf a 1 b", "nan a", "-inf a", "1 a 0 b",
     "1e-400 a 1 b", "1 a 2", "1 2", "2024"],
)  # fmt: skip
def test_weights_that_leave_nothing_to_read_are_refused(words: str) -> None:
    with pytest.raises(ConfigError, match="--data-path"):
        parse_blend("--data-path", words.split())


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (Count, ("1", "2147483647", " 7 "), ("0", "2147483648", "1e3", "0x10", "٣", "9" * 5000)),
        (Index, ("0", "2147483647"), ("-1", "2147483648", "nan", "inf", "1,000")),
        (Layers, ("1", "10000"), ("0", "10001")),
        (Bytes, ("0", "9223372036854775807"), ("-1", "9223372036854775808")),
        (Seed, ("0", "4294967295"), ("-1", "4294967296")),
        (Minutes, ("0.5", "525600"), ("0", "-1", "525601", "inf", "nan", "1e300")),
        (Seconds, ("1", "31536000"), ("0", "31536001", "inf", "nan")),
    ],
)
def test_bounds_of_numbers(kind: object, good: tuple[str, ...], bad: tuple[str, ...]) -> None:
    adapter = TypeAdapter(kind)
    for text in good:
        assert float(adapter.validate_python(text)) == float(text)
    for text in bad:
        with pytest.raises(ValidationError):
            adapter.validate_python(text)


def test_seeds_are_those_that_every_generator_takes() -> None:
    largest = TypeAdapter(Seed).validate_python("4294967295")
    numpy.random.RandomState(largest)
    torch.Generator().manual_seed(largest)
    with pytest.raises(ValueError):
        numpy.random.RandomState(largest + 1)


@pytest.mark.parametrize(
    "flags",
    [
        "--seed 4294967296",
        "--seed -1",
        "--seq-length 2147483648",
        "--train-iters 99999999999999999999",
        "--num-layers 100000000",
        "--distributed-timeout-minutes 1e300",
        "--exit-duration-in-mins inf",
        "--pipeline-model-parallel-size 2 --pipeline-model-parallel-layout Et*999999999|tL",
    ],
)
def test_a_run_with_numbers_that_do_not_fit_is_refused(flags: str) -> None:
    with pytest.raises(ConfigError, match=flags.split()[-2]):
        parse_pretrain([*MOCK.split(), *flags.split()], {})


@pytest.mark.parametrize("text", ["((t*99999)*99999)*9|t", "t*" + "9" * 5000, "٨,٨", "8,²"])
def test_layouts_that_are_no_layouts(text: str) -> None:
    with pytest.raises(ConfigError, match="layout"):
        parse_layout(text, 16, 2)


@pytest.mark.parametrize("text", ["0_1_²", "0_1_٢", "0_1_" + "9" * 5000])
def test_maps_are_written_in_ascii_digits(text: str) -> None:
    with pytest.raises(ConfigError, match="layer 2 of the map"):
        build_map(3, "standard", None, text)
    with pytest.raises(ConfigError, match="--kv-pattern"):
        build_map(3, "cla:" + text[4:], None)
