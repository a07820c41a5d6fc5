"""Runs that change their blend on the way, read test data, and count what they read of each
source."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch

from megatron_kvshare.config import DataConfig
from megatron_kvshare.config.data_files import DataStage
from megatron_kvshare.data import stream, train_data
from megatron_kvshare.data.data_plan import DataRequest
from megatron_kvshare.data.train_data import RankShare, TrainData
from megatron_kvshare.data.vocabulary import Vocabulary
from megatron_kvshare.errors import DataError

from .conftest import WriteTokens, counting_documents

SEQ, GLOBAL, STEPS = 16, 8, 20


def build(
    words: tuple[str, ...],
    stages: tuple[DataStage, ...] = (),
    share: RankShare | None = None,
    eval_iters: int = 0,
    **settings: object,
) -> TrainData:
    request = DataRequest(
        seq_length=SEQ,
        global_batch_size=GLOBAL,
        train_iters=STEPS,
        eval_iters=eval_iters,
        vocabulary=Vocabulary(100, eod=99),
        stages=stages,
        reads_test=bool(settings.get("test_data_path")),
    )
    name = "train_data_path" if "valid_data_path" in settings else "data_path"
    settings = {"split": "80,20,0", name: words, **settings}
    return train_data.build(DataConfig(**settings), request, share)


def steps(data: TrainData, number: int, consumed: int = 0, share: RankShare | None = None):
    """Samples of whole steps of one rank, as rows."""
    share = share or RankShare()
    count = number * GLOBAL // (share.micro_batch_size * share.dp_size)
    return torch.cat([batch.tokens for batch in islice(data.train_batches(consumed), count)])


@pytest.fixture
def sources(write_tokens: WriteTokens) -> dict[str, str]:
    """Every token of a source is its number, so that samples tell where they are from."""
    sizes = {"web": (1, 4000), "math": (2, 900), "code": (3, 700)}
    return {
        name: write_tokens([[number] * (size // 10)] * 10, name)
        for name, (number, size) in sizes.items()
    }


def staged(
    write_tokens: WriteTokens, **start: int
) -> tuple[tuple[str, ...], tuple[DataStage, ...]]:
    """Two blends of documents that differ, the second one from somewhere on."""
    a = write_tokens(counting_documents(60), "a")
    b = write_tokens(counting_documents(50, first=40), "b")
    return ("0.7", a, "0.3", b), (DataStage("s.yaml:1", ("1", a, "2", b), **start),)


@pytest.mark.parametrize(
    ("start", "first"),
    [({"step": 6}, 5 * GLOBAL), ({"tokens": 700}, 44), ({"tokens": 44 * SEQ}, 44)],
)
def test_a_stage_reads_what_a_run_of_it_alone_reads(
    write_tokens: WriteTokens, start: dict[str, int], first: int
) -> None:
    """Also where it begins in the middle of a batch, and before that the run reads as ever."""
    words, stages = staged(write_tokens, **start)
    rows = steps(build(words, stages), STEPS)
    assert torch.equal(rows[:first], steps(build(words), STEPS)[:first])
    alone = steps(build(stages[0].words), STEPS)
    assert torch.equal(rows[first:], alone[: len(rows) - first])


def test_resume_is_exact_on_either_side_of_a_boundary(write_tokens: WriteTokens) -> None:
    words, stages = staged(write_tokens, tokens=700)
    through = steps(build(words, stages), STEPS)
    for done in (4, 5, 6):  # the boundary, sample 44, is inside step 6
        rest = steps(build(words, stages), STEPS - done, consumed=done * GLOBAL)
        assert torch.equal(rest, through[done * GLOBAL :])


@pytest.mark.parametrize("dp_size", [2, 4])
def test_every_layout_changes_at_the_same_sample(write_tokens: WriteTokens, dp_size: int) -> None:
    words, stages = staged(write_tokens, tokens=700)
    whole = steps(build(words, stages), STEPS)
    parts = []
    for rank in range(dp_size):
        share = RankShare(micro_batch_size=2, dp_rank=rank, dp_size=dp_size)
        parts.append(steps(build(words, stages, share), STEPS, share=share))
    for step in range(STEPS):
        size = GLOBAL // dp_size
        rows = [row for part in parts for row in part[step * size : (step + 1) * size].tolist()]
        wanted = whole[step * GLOBAL : (step + 1) * GLOBAL].tolist()
        assert Counter(map(tuple, rows)) == Counter(map(tuple, wanted))


def test_loader_processes_change_nothing(write_tokens: WriteTokens) -> None:
    words, stages = staged(write_tokens, step=3)
    plain, loaded = (steps(build(words, stages, num_workers=n), 6) for n in (0, 2))
    assert torch.equal(plain, loaded)


def test_held_out_documents_stay_so_in_every_stage(write_tokens: WriteTokens) -> None:
    """--split cuts the sources of a stage too; a stage of separate paths is read whole."""
    a = write_tokens([[number] * 40 for number in range(50)], "a")
    stages = (DataStage("s.yaml:1", (a,), step=5),)
    split = build((a,), stages, eval_iters=2)
    seen = set(steps(split, STEPS).unique().tolist())
    held_out = {t for batch in split.valid_batches() for t in batch.tokens.unique().tolist()}
    assert held_out and not seen & held_out
    b = write_tokens([[number] * 40 for number in range(50, 90)], "b")
    separate = build((b,), stages, valid_data_path=(b,), eval_iters=2)
    assert set(range(40, 50)) & set(steps(separate, STEPS)[4 * GLOBAL :].unique().tolist())


def test_tokens_are_counted_by_source(
    sources: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As what the samples hold says, over borders of stages and of the blend's pattern."""
    monkeypatch.setattr(stream, "_PATTERN_PICKS", 37)
    web, math, code = sources.values()
    stages = (
        DataStage("s.yaml:1", ("3", web, "1", math), step=6),
        DataStage("s.yaml:2", (code,), tokens=100 * SEQ),
    )
    data = build(("5", web, "1", math, "1", code), stages, split="1,0,0")
    rows = steps(data, STEPS)
    assert (rows == rows[:, :1]).all()
    for first, end in (
        (0, 160),
        (0, 0),
        (3, 5),
        (30, 45),
        (36, 39),
        (70, 75),
        (39, 130),
        (99, 101),
    ):
        held = Counter(rows[first:end, 0].tolist())
        wanted = {name: held[n] * SEQ for n, name in enumerate((web, math, code), 1)}
        found = data.tokens_by_source(first, end)
        assert {name: found.get(name, 0) for name in wanted} == wanted
    assert [data.source_of(sample)[0] for sample in range(160)] == [
        (web, math, code)[number - 1] for number in rows[:, 0].tolist()
    ]
    assert [data.stage_of(sample) for sample in (0, 39, 40, 99, 100, 10**6)] == [0, 0, 1, 1, 2, 2]


def test_made_up_tokens_have_no_source() -> None:
    assert build((), mock_data=True).tokens_by_source(0, 80) == {}


def test_the_plan_adds_up_the_stages(sources: dict[str, str]) -> None:
    web, math, _ = sources.values()
    stages = (DataStage("s.yaml:1", ("1", web, "1", math), step=16),)
    data = build(("3", web, "1", math), stages, split="1,0,0")
    rows = [(row.stage, row.source, row.samples) for row in data.plan.rows]
    assert rows == [(0, web, 90), (0, math, 30), (1, web, 20), (1, math, 20)]
    assert data.plan.epochs == pytest.approx({web: 110 * SEQ / 4000, math: 50 * SEQ / 900})
    text = "\n".join(data.plan.lines())
    assert "train 2 takes over with sample 120, after 1,920 tokens (from-step 16 in s.yaml" in text
    assert f"all stages together: 0.89 epochs of {math}" in text
    assert data.plan.warnings() == []


def test_epochs_of_all_stages_count_together(sources: dict[str, str]) -> None:
    """Stages begin anew, so what two of them read is read twice."""
    web, math, _ = sources.values()
    stages = [DataStage("s:1", (math,), step=2), DataStage("s:2", (web,), step=14)]
    assert build((math,), (stages[1],), split="1,0,0").plan.epochs[math] < 2
    stages += [DataStage("s:3", (math,), step=15)]
    plan = build((math,), tuple(stages), split="10,0,0", max_epochs=3.0).plan
    assert plan.epochs[math] == pytest.approx((8 + 96 + 48) * SEQ / 900)
    with pytest.raises(DataError, match=r"math 2\.70 times"):
        build((math,), tuple(stages), split="1,0,0", max_epochs=2.0)


def test_epochs_above_four_warn(write_tokens: WriteTokens) -> None:
    small = write_tokens([[1] * 50] * 10, "small")
    plan = build((small,), split="1,0,0").plan
    (warning,) = plan.warnings()
    assert small in warning and "5.1 epochs" in warning and "--max-epochs" in warning
    assert plan.warnings(max_epochs=6.0) == []
    assert build((small,), split="1,0,0", max_epochs=5.2).plan.rows
    with pytest.raises(DataError, match=r"--max-epochs = 5\.1: the run reads .*small 5\.12 times"):
        build((small,), split="1,0,0", max_epochs=5.1)


def test_evaluation_may_repeat_its_data(write_tokens: WriteTokens) -> None:
    """The limit is for what is learned from."""
    train = write_tokens([[1] * 500] * 10, "train")
    valid = write_tokens([[2] * 20], "valid")
    data = build((train,), valid_data_path=(valid,), eval_iters=4, max_epochs=1.0)
    assert data.plan.warnings() == []


def test_a_stage_behind_the_end_is_told(sources: dict[str, str]) -> None:
    stages = (DataStage("s.yaml:4", (sources["math"],), step=STEPS + 1),)
    plan = build((sources["web"],), stages).plan
    (warning,) = plan.warnings()
    assert "s.yaml:4" in warning and "nothing of it is read" in warning
    assert plan.rows[-1].samples == 0


def test_stages_are_part_of_the_identity(sources: dict[str, str]) -> None:
    web, math, _ = sources.values()
    plain = build((web,)).identity
    assert plain["stages"] == []
    (stage,) = build((web,), (DataStage("s:1", (math,), step=3),)).identity["stages"]
    assert stage["first_sample"] == 16 and stage["train"][0]["source"] == math
    (later,) = build((web,), (DataStage("s:1", (math,), tokens=16 * SEQ),)).identity["stages"]
    assert later == stage  # said in another way


def test_all_faults_of_a_stage_are_told(sources: dict[str, str], tmp_path: Path) -> None:
    stages = (DataStage("s.yaml:1", (str(tmp_path / "x"), str(tmp_path / "y")), step=3),)
    with pytest.raises(DataError) as caught:
        build((sources["web"],), stages)
    assert len(caught.value.faults) == 2


def test_test_data_is_read_apart(sources: dict[str, str]) -> None:
    web, math, code = sources.values()
    data = build((web,), valid_data_path=(math,), test_data_path=(code,), eval_iters=2)
    rows = [
        torch.cat([b.tokens for b in each()]) for each in (data.valid_batches, data.test_batches)
    ]
    assert [each.unique().tolist() for each in rows] == [[2], [3]]
    parts = [line.split()[0] for line in data.plan.lines()[:4]]
    assert parts == ["part", "train", "valid", "test"]
    without = build((web,), valid_data_path=(math,), test_data_path=(code,))
    assert [row.source for row in without.plan.rows] == [web]
