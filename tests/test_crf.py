"""The CRF layer against brute force over all label sequences, and the feature-based tagger around it."""

from __future__ import annotations

import itertools
import json
import math
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from hanmo.errors import DataError, ModelError, ResourceError, UsageError
from hanmo.folder import atomic_folder
from hanmo.models.crf import BROKEN_RULE, LinearChainCRF, span_constraints
from hanmo.models.crf_features import TEMPLATES, choose_template
from hanmo.models.crf_tagger import CRFTagger, read_crfsuite

# ---- the layer --------------------------------------------------------------------------------------------------


def random_crf(num_labels: int, seed: int, scale: float = 1.0, **options) -> LinearChainCRF:
    """A CRF in float64 with random scores."""
    generator = torch.Generator().manual_seed(seed)
    crf = LinearChainCRF(num_labels, **options).double()
    for parameter in crf.parameters():
        parameter.data = scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return crf


def path_score(crf: LinearChainCRF, emissions: torch.Tensor, path: tuple[int, ...]) -> torch.Tensor:
    """The definition: emissions [T, L] and one path of T labels."""
    score = crf.start[path[0]] + crf.end[path[-1]] + sum(emissions[t, label] for t, label in enumerate(path))
    return score + sum(crf.transitions[a, b] for a, b in itertools.pairwise(path))


def brute_force(crf: LinearChainCRF, emissions: torch.Tensor) -> tuple[list[tuple[int, ...]], torch.Tensor]:
    """All paths and their log-probabilities."""
    paths = list(itertools.product(range(crf.num_labels), repeat=len(emissions)))
    return paths, torch.stack([path_score(crf, emissions, path) for path in paths]).log_softmax(0)


def right_mask(lengths: list[int], T: int) -> torch.Tensor:
    return torch.arange(T)[None] < torch.tensor(lengths)[:, None]


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    num_labels=st.integers(1, 3),
    seed=st.integers(0, 2**20),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
)
def test_loss_best_path_and_marginals_are_those_of_brute_force(lengths, num_labels, seed, scale) -> None:
    crf = random_crf(num_labels, seed, scale)
    generator = torch.Generator().manual_seed(seed + 1)
    T = max(lengths)
    emissions = scale * torch.randn(len(lengths), T, num_labels, generator=generator, dtype=torch.float64)
    tags = torch.randint(num_labels, (len(lengths), T), generator=generator)
    mask = right_mask(lengths, T)
    expected_loss = torch.zeros((), dtype=torch.float64)
    expected_marginals = torch.zeros_like(emissions)
    for row, length in enumerate(lengths):
        paths, logprobs = brute_force(crf, emissions[row, :length])
        expected_loss = expected_loss - logprobs[paths.index(tuple(tags[row, :length].tolist()))]
        for path, logprob in zip(paths, logprobs.detach(), strict=True):
            for t, label in enumerate(path):
                expected_marginals[row, t, label] += logprob.exp()
        decoded = tuple(crf.decode(emissions, mask)[row])
        assert len(decoded) == length
        assert logprobs[paths.index(decoded)].item() == pytest.approx(logprobs.max().item(), abs=1e-9)
    tags[~mask] = -100  # what stands outside the mask does not matter
    emissions[~mask] = math.nan
    loss = crf(emissions, tags, mask)
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-9, abs=1e-9)
    torch.testing.assert_close(crf.marginals(emissions, mask), expected_marginals, rtol=1e-9, atol=1e-9)
    if scale:  # gradients too, through autograd of the definition
        ours = torch.autograd.grad(loss, list(crf.parameters()))
        theirs = torch.autograd.grad(expected_loss, list(crf.parameters()), allow_unused=True)
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, torch.zeros_like(mine) if other is None else other, rtol=1e-7, atol=1e-9)


def test_gradients_by_finite_differences() -> None:
    crf = random_crf(3, seed=5)
    emissions = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True)
    tags, mask = torch.tensor([[0, 2, 1, 1], [2, 2, 0, 0]]), right_mask([4, 2], 4)
    parameters = (crf.transitions, crf.start, crf.end)

    def loss(emissions, transitions, start, end):
        scores = dict(zip(("transitions", "start", "end"), (transitions, start, end), strict=True))
        return torch.func.functional_call(crf, scores, (emissions, tags, mask))

    assert torch.autograd.gradcheck(loss, (emissions, *parameters))


def test_a_batch_equals_its_sequences_and_padding_does_not_matter() -> None:
    crf = random_crf(4, seed=1)
    lengths = [7, 1, 3]
    emissions, tags, mask = torch.randn(3, 7, 4).double(), torch.randint(4, (3, 7)), right_mask(lengths, 7)
    alone = [(emissions[i : i + 1, :n], tags[i : i + 1, :n]) for i, n in enumerate(lengths)]
    assert crf(emissions, tags, mask).item() == pytest.approx(sum(crf(e, t).item() for e, t in alone))
    assert crf.decode(emissions, mask) == [crf.decode(e)[0] for e, _ in alone]
    together = crf.marginals(emissions, mask)
    for i, n in enumerate(lengths):
        torch.testing.assert_close(together[i, :n], crf.marginals(alone[i][0])[0])
    torch.testing.assert_close(together.sum(-1), mask.double())


def test_without_transitions_it_is_a_softmax_at_each_position() -> None:
    crf = LinearChainCRF(5)
    emissions, tags = torch.randn(2, 6, 5), torch.randint(5, (2, 6))
    expected = torch.nn.functional.cross_entropy(emissions.flatten(0, 1), tags.flatten(), reduction="sum")
    torch.testing.assert_close(crf(emissions, tags), expected)
    torch.testing.assert_close(crf.marginals(emissions), emissions.softmax(-1))
    assert crf.decode(emissions) == emissions.argmax(-1).tolist()


def test_empty_sequences_count_nothing() -> None:
    crf = random_crf(3, seed=2)
    emissions, tags = torch.randn(2, 3, 3).double(), torch.zeros(2, 3, dtype=torch.long)
    mask = right_mask([0, 3], 3)
    assert crf(emissions, tags, mask).item() == pytest.approx(crf(emissions[1:], tags[1:]).item())
    assert crf.decode(emissions, mask)[0] == []
    assert crf.marginals(emissions, mask)[0].sum() == 0
    nothing = torch.zeros(2, 0, 3)
    assert crf(nothing, torch.zeros(2, 0, dtype=torch.long)).item() == 0
    assert crf.decode(nothing) == [[], []] and crf.marginals(nothing).shape == (2, 0, 3)


def test_long_sequences_and_extreme_scores_stay_finite() -> None:
    crf = LinearChainCRF(3)
    emissions = torch.full((1, 500, 3), -1e4)
    emissions[..., 1] = 1e4
    wrong = torch.zeros(1, 500, dtype=torch.long)
    emissions.requires_grad_()
    loss = crf(emissions, wrong)
    loss.backward()
    assert loss.item() == pytest.approx(500 * 2e4) and torch.isfinite(emissions.grad).all()
    assert crf.decode(emissions) == [[1] * 500]
    assert crf(emissions, torch.ones_like(wrong)).item() == pytest.approx(0, abs=1)
    torch.testing.assert_close(crf.marginals(emissions)[0, :, 1], torch.ones(500))


def test_half_precision_is_scored_in_float32() -> None:
    crf, tags = random_crf(3, seed=3).float(), torch.randint(3, (1, 200))
    emissions = (50 * torch.randn(1, 200, 3)).half()
    assert crf(emissions, tags).dtype == torch.float32
    torch.testing.assert_close(crf(emissions, tags), crf(emissions.float(), tags))


def test_it_learns_what_only_transitions_can_tell() -> None:
    """Labels alternate whatever the emissions say: a softmax at each position stays at chance."""
    torch.manual_seed(0)
    crf = LinearChainCRF(2)
    optimizer = torch.optim.SGD(crf.parameters(), lr=0.05)
    tags = torch.tensor([[0, 1, 0, 1, 0, 1]])
    for _ in range(30):
        optimizer.zero_grad()
        crf(torch.zeros(1, 6, 2), tags).backward()
        optimizer.step()
    assert crf.decode(torch.zeros(1, 6, 2)) == tags.tolist()


@pytest.mark.parametrize(
    "labels",
    [["O", "B-PER", "I-PER", "B-LOC", "I-LOC"], ["B", "M", "E", "S"], ["O", "B-X", "I-X", "E-X", "S-X", "B-Y", "E-Y"]],
)
def test_constrained_paths_are_valid_and_the_best_of_the_valid(labels: list[str]) -> None:
    crf = random_crf(len(labels), seed=7, constraints=span_constraints(labels))
    closed = any(label.startswith("E") for label in labels)
    paths = itertools.product(range(len(labels)), repeat=4)
    valid = [path for path in paths if is_valid([labels[i] for i in path], closed)]
    assert 0 < len(valid) < len(labels) ** 4
    for seed in range(20):
        emissions = 5 * torch.randn(4, len(labels), generator=torch.Generator().manual_seed(seed)).double()
        scores = [path_score(crf, emissions, path).item() for path in valid]
        assert tuple(crf.decode(emissions[None])[0]) == valid[int(np.argmax(scores))]
        broken = crf.marginals(emissions[None])[0]
        shares = np.exp(np.array(scores) - np.logaddexp.reduce(scores))
        expected = torch.zeros_like(broken)
        for path, share in zip(valid, shares, strict=True):
            expected[range(4), path] += share
        torch.testing.assert_close(broken, expected, rtol=1e-6, atol=1e-9)
    assert "forbidden" not in crf.state_dict()


def is_valid(path: list[str], closed: bool) -> bool:
    """Whether labels obey IOB2 (or BMES and BIOES, where spans must be closed), read with the open span in mind."""
    span = None
    for label in path:
        kind, _, name = label.partition("-")
        if (kind in ("I", "M", "E") and span != name) or (kind in ("O", "B", "S") and closed and span is not None):
            return False
        span = name if kind in ("B", "I", "M") else None
    return not closed or span is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda crf: crf(torch.zeros(1, 2, 4), torch.zeros(1, 2, dtype=torch.long)), "emissions"),
        (lambda crf: crf(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long)), "emissions"),
        (lambda crf: crf(torch.zeros(1, 2, 3), torch.zeros(1, 3, dtype=torch.long)), "tags"),
        (lambda crf: crf(torch.zeros(1, 2, 3), torch.tensor([[0, 3]])), "outside 0..2"),
        (lambda crf: crf(torch.zeros(1, 2, 3), torch.tensor([[0, -100]])), "outside 0..2"),
        (lambda crf: crf.decode(torch.zeros(1, 2, 3), torch.ones(1, 3)), "mask"),
        (lambda crf: crf.decode(torch.zeros(1, 2, 3), torch.tensor([[False, True]])), "True first"),
        (lambda crf: crf.marginals(torch.zeros(1, 3, 3), torch.tensor([[True, False, True]])), "True first"),
        (lambda _: LinearChainCRF(0), "at least one"),
        (lambda _: LinearChainCRF(4, span_constraints(["O", "B-X", "I-X"])), "3 labels"),
        (lambda _: span_constraints(["NOUN", "VERB"]), "no span label"),
    ],
)
def test_what_does_not_fit_is_refused(call, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        call(LinearChainCRF(3))
    assert caught.value.zh


def test_breaking_a_rule_costs_but_stays_finite() -> None:
    crf = LinearChainCRF(3, span_constraints(["O", "B-X", "I-X"]))
    loss = crf(torch.zeros(1, 2, 3), torch.tensor([[0, 2]]))
    loss.backward()
    assert -BROKEN_RULE <= loss.item() < -1.01 * BROKEN_RULE and torch.isfinite(crf.transitions.grad).all()


# ---- the tagger -------------------------------------------------------------------------------------------------

ENGLISH = (
    [
        ["Ann", "met", "Bob", "in", "Paris", "."],
        ["Paris", "is", "big"],
        ["Bob", "left", "Rome"],
        ["it", "is", "in", "Rome"],
    ],
    [
        ["B-PER", "O", "B-PER", "O", "B-LOC", "O"],
        ["B-LOC", "O", "O"],
        ["B-PER", "O", "B-LOC"],
        ["O", "O", "O", "B-LOC"],
    ],
)
CHINESE = (
    [["王明", "在", "北京", "工作"], ["他", "喜欢", "北京"], ["李红", "去", "上海", "了"], ["上海", "很", "大"]],
    [["B-PER", "O", "B-LOC", "O"], ["O", "O", "B-LOC"], ["B-PER", "O", "B-LOC", "O"], ["B-LOC", "O", "O"]],
)
CHARACTERS = (
    ["今天天气很好", "我们学习中文", "今天学习", "天气好"],
    [list("BEBESS"), list("BEBEBE"), list("BEBE"), list("BES")],
)


@pytest.mark.parametrize(("data", "template"), [(ENGLISH, "en"), (CHINESE, "zh-words"), (CHARACTERS, "zh-characters")])
def test_the_template_is_chosen_by_the_tokens_and_the_data_are_learned(data, template: str) -> None:
    tagger = CRFTagger.train(*data)
    assert tagger.template == template and tagger.describe()["template"] == template
    assert tagger.predict(data[0]) == data[1]
    assert tagger.labels == tuple(sorted({tag for tags in data[1] for tag in tags}))
    other = "zh-words" if template == "en" else "en"
    assert CRFTagger.train([list(sentence) for sentence in data[0]], data[1], template=other).template == other


def test_it_generalizes_by_its_features() -> None:
    """Words never seen: told by shape and suffix in English, by surname, characters and repetition in Chinese."""
    words = ["walking", "talking", "Maria", "Peter", "42", "1,000"]
    sentences = [[word] for word in words] * 3
    tagger = CRFTagger.train(sentences, [["V"], ["V"], ["N"], ["N"], ["D"], ["D"]] * 3)
    assert tagger.predict([["singing"], ["Robert"], ["77"]]) == [["V"], ["N"], ["D"]]
    words = ["看看", "想想", "北京市", "天津市", "王明", "李红"]
    tagger = CRFTagger.train([[word] for word in words] * 3, [["V"], ["V"], ["L"], ["L"], ["P"], ["P"]] * 3)
    assert tagger.predict([["走走"], ["南京市"], ["张伟"]]) == [["V"], ["L"], ["P"]]


@pytest.mark.parametrize("data", [ENGLISH, CHINESE, CHARACTERS])
@pytest.mark.parametrize("options", [{}, {"c1": 0.0, "c2": 1.0}, {"c1": 1.0, "c2": 0.0, "min_count": 2}])
def test_tags_and_marginals_are_those_of_crfsuite(data, options) -> None:
    """The weights are taken out of python-crfsuite's file and decoded by our layer: nothing may change on the way."""
    import pycrfsuite

    settings = {"c1": 0.05, "c2": 0.05, "min_count": 1, **options}
    tagger = CRFTagger.train(*data, **settings)
    features = [TEMPLATES[tagger.template](list(sentence)) for sentence in data[0]]
    trainer = pycrfsuite.Trainer(verbose=False)
    trainer.set_params({"c1": settings["c1"], "c2": settings["c2"], "max_iterations": 100})
    trainer.set("feature.possible_transitions", True)
    counts = Counter(name for rows in features for row in rows for name in row)
    for rows, tags in zip(features, data[1], strict=True):
        trainer.append([[name for name in row if counts[name] >= settings["min_count"]] for row in rows], tags)
    with tempfile.TemporaryDirectory() as folder:
        trainer.train(f"{folder}/model")
        other = pycrfsuite.Tagger()
        other.open(f"{folder}/model")
    mixed = [data[0][0][::-1], data[0][1][:1], data[0][2], data[0][3] * 3]
    for sentence, tags, marginals in zip(mixed, tagger.predict(mixed), tagger.predict_marginals(mixed), strict=True):
        best = other.tag(TEMPLATES[tagger.template](list(sentence)))  # perhaps another one of equals
        assert other.probability(tags) == pytest.approx(other.probability(best), rel=1e-9)
        for t in range(len(sentence)):
            for label, share in zip(tagger.labels, marginals[t], strict=True):
                assert share == pytest.approx(other.marginal(label, t) if label in other.labels() else 0, abs=1e-9)


def test_marginals_are_probabilities_and_agree_with_the_tags() -> None:
    tagger = CRFTagger.train(*ENGLISH)
    sentences = [["Bob"], ["Rome", "met", "Ann", "in", "Berlin"]]
    marginals = tagger.predict_marginals(sentences)
    assert [array.shape for array in marginals] == [(1, 3), (5, 3)]
    for array in marginals:
        np.testing.assert_allclose(array.sum(1), 1)
    assert tagger.labels[marginals[0][0].argmax()] == tagger.predict(sentences)[0][0] == "B-PER"
    assert tagger.predict([]) == [] and tagger.predict_marginals([]) == []


def test_many_sentences_of_any_length_come_back_in_order() -> None:
    tagger = CRFTagger.train(*CHARACTERS)
    draw = random.Random(0)
    sentences = ["".join(draw.choices("今天气很好我们学习中文龘", k=draw.randint(1, 30))) for _ in range(200)]
    assert tagger.predict(sentences) == [tagger.predict([sentence])[0] for sentence in sentences]
    assert len(tagger.predict(["今天" * 3000])[0]) == 6000


def test_settings_matter_and_training_is_deterministic() -> None:
    plain, again = CRFTagger.train(*CHINESE), CRFTagger.train(*CHINESE)
    for name, array in plain.weights.items():
        assert (array == again.weights[name]).all()
    assert CRFTagger.train(*CHINESE, c1=0.5).weights["values"].size < plain.weights["values"].size
    assert len(CRFTagger.train(*CHINESE, min_count=2, c1=0).attributes) < len(
        CRFTagger.train(*CHINESE, c1=0).attributes
    )
    short = CRFTagger.train(*CHINESE, max_iterations=1)
    assert np.abs(short.weights["values"]).max() < np.abs(plain.weights["values"]).max()
    assert plain.training["sentences"] == 4 and plain.training["tokens"] == 14


# ---- the tagger on disk -----------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=15)
@given(
    st.lists(
        st.lists(
            st.tuples(st.text(min_size=1, max_size=4), st.sampled_from(["O", "B-人", "I-人"])), min_size=1, max_size=5
        ),
        min_size=1,
        max_size=5,
    )
)
def test_any_tokens_survive_the_disk(tmp_path_factory, data) -> None:
    sentences, tags = [[t for t, _ in row] for row in data], [[t for _, t in row] for row in data]
    folder = tmp_path_factory.mktemp("crf") / "model"
    tagger = CRFTagger.train(sentences, tags, max_iterations=20)
    tagger.save(folder)
    loaded = CRFTagger.load(folder)
    assert loaded.predict(sentences) == tagger.predict(sentences)
    for mine, other in zip(loaded.predict_marginals(sentences), tagger.predict_marginals(sentences), strict=True):
        assert (mine == other).all()
    assert loaded.describe() == tagger.describe()


def test_a_loaded_tagger_needs_no_crfsuite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    CRFTagger.train(*ENGLISH).save(tmp_path / "model")
    assert {p.name for p in (tmp_path / "model").iterdir()} == {
        "config.json",
        "attributes.json",
        "model.safetensors",
        "hanmo.json",
    }
    monkeypatch.setitem(sys.modules, "pycrfsuite", None)
    assert CRFTagger.load(tmp_path / "model").predict(ENGLISH[0]) == ENGLISH[1]
    with pytest.raises(ResourceError, match="python-crfsuite") as caught:
        CRFTagger.train(*ENGLISH)
    assert "hanmo[classical]" in caught.value.fix


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    CRFTagger.train(*CHINESE).save(folder)
    return folder


@pytest.mark.parametrize("name", ["config.json", "attributes.json", "model.safetensors"])
def test_truncated_altered_and_missing_files_are_refused(saved: Path, tmp_path: Path, name: str) -> None:
    content = (saved / name).read_bytes()
    for damage in (content[:-5], content[:30] + b"?" + content[31:], None):
        folder = tmp_path / "copy"
        folder.mkdir(exist_ok=True)
        for path in saved.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        (folder / name).unlink() if damage is None else (folder / name).write_bytes(damage)
        with pytest.raises(ModelError, match=r"bytes, its manifest|SHA-256|missing"):
            CRFTagger.load(folder)


CONFIG_DAMAGE = {
    "another kind of model": lambda c: c | {"model_type": "linear"},
    "an unknown template": lambda c: c | {"template": "../../evil"},
    "no labels": lambda c: c | {"labels": []},
    "one label more": lambda c: c | {"labels": [*c["labels"], "X"]},
    "labels twice": lambda c: c | {"labels": ["O"] * 3},
    "labels that are numbers": lambda c: c | {"labels": [1, 2, 3]},
    "no object": lambda c: [c],
}
TENSOR_DAMAGE = {
    "no transitions": lambda t: {key: value for key, value in t.items() if key != "transitions"},
    "another type": lambda t: t | {"values": t["values"].astype(np.float32)},
    "NaN": lambda t: t | {"values": t["values"] * np.nan},
    "a weight too few": lambda t: t | {"values": t["values"][1:]},
    "a label outside": lambda t: t | {"label_ids": t["label_ids"] + 3},
    "a negative label": lambda t: t | {"label_ids": t["label_ids"] - 3},
    "places outside": lambda t: t | {"begins": t["begins"] * 1000},
    "places backwards": lambda t: t | {"begins": np.concatenate([[0], t["begins"][:0:-1]])},
    "a place too few": lambda t: t | {"begins": t["begins"][:-1]},
}


@pytest.mark.parametrize("case", [*CONFIG_DAMAGE, *TENSOR_DAMAGE, "attributes twice", "attributes no list"])
def test_well_sealed_nonsense_is_refused(saved: Path, tmp_path: Path, case: str) -> None:
    config, tensors = json.loads((saved / "config.json").read_text()), load_file(saved / "model.safetensors")
    attributes = json.loads((saved / "attributes.json").read_text())
    changed = {"attributes twice": ["bias"] * len(attributes), "attributes no list": {"bias": 1}}
    with atomic_folder(tmp_path / "model") as folder:
        (folder / "config.json").write_text(json.dumps(CONFIG_DAMAGE.get(case, lambda c: c)(config)))
        (folder / "attributes.json").write_text(json.dumps(changed.get(case, attributes)))
        save_file(TENSOR_DAMAGE.get(case, lambda t: t)(tensors), folder / "model.safetensors")
    with pytest.raises(ModelError, match="not sound") as caught:
        CRFTagger.load(tmp_path / "model")
    assert caught.value.zh and str(tmp_path) in caught.value.where


# ---- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sentences", "tags", "message", "where"),
    [
        ([], [], "no sentences", ""),
        ([["a"]], [], "1 sentences and 0", ""),
        ([["a"], []], [["O"], []], "sentence is empty", "record 2"),
        ([["a"], ["b", ""]], [["O"], ["O", "O"]], "token is empty", "record 2"),
        ([["a"], ["b", 7]], [["O"], ["O", "O"]], "token is empty or not", "record 2"),
        ([["a", "b"]], [["O"]], "2 tokens and 1 tags", "record 1"),
        ([["a"], ["b"]], [["O"], [""]], "tag is empty", "record 2"),
        ([["a"], ["b"]], [["O"], [None]], "tag is empty or not", "record 2"),
        ([["good"], "a sentence"], [["O"], ["O"] * 10], "string, not a sequence of words", "record 2"),
    ],
)
def test_records_that_cannot_be_learned_from(sentences, tags, message: str, where: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        CRFTagger.train(sentences, tags)
    assert caught.value.where == where and caught.value.zh


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"template": "zh-word"}, "template"),
        ({"c1": -1}, "c1"),
        ({"c2": float("nan")}, "c2"),
        ({"max_iterations": 0}, "max_iterations"),
        ({"min_count": 0}, "min_count"),
    ],
)
def test_settings_that_mean_nothing(options: dict, where: str) -> None:
    with pytest.raises(UsageError) as caught:
        CRFTagger.train(*ENGLISH, **options)
    assert caught.value.where == where and caught.value.zh
    if where == "template":
        assert "zh-words" in caught.value.fix


def test_sentences_that_cannot_be_tagged(saved: Path) -> None:
    tagger = CRFTagger.load(saved)
    for sentences, message in ((["今天"], "string"), ([["他"], []], "empty"), ([["他", ""]], "token is empty")):
        for call in (tagger.predict, tagger.predict_marginals):
            with pytest.raises(DataError, match=message) as caught:
                call(sentences)
            assert caught.value.where == f"record {len(sentences)}"


def test_another_format_of_crfsuite_is_noticed() -> None:
    for model in (b"lCRF" + bytes(60), b"xCRF" + bytes(60)):
        with pytest.raises(ModelError, match="python-crfsuite"):
            read_crfsuite(model, "", 2)


# ---- features ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", list(TEMPLATES))
@settings(deadline=None, max_examples=50)
@given(data=st.data())
def test_templates_take_any_tokens(template: str, data) -> None:
    sentence = data.draw(st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=6))
    rows = TEMPLATES[template](sentence)
    assert len(rows) == len(sentence) and all(row[0] == "bias" for row in rows)
    assert all(len(set(row)) == len(row) for row in rows)


def test_features_of_a_sentence() -> None:
    row = TEMPLATES["en"](["The", "Well-Known", "USA"])[1]
    assert {"w=Well-Known", "l=well-known", "shape=Xx-Xx", "pre2=we", "suf3=own", "hyphen", "l-1=the", "l+1=usa"} <= {
        *row
    }
    assert "upper" in TEMPLATES["en"](["USA"])[0] and "upper" not in row
    row = TEMPLATES["zh-words"](["欧阳修", "看看", "3月"])[0]
    assert {"surname=3", "first=欧", "last2=阳修", "w+1=看看", "w-1=<>", "class=han"} <= {*row}
    assert "reduplication=AA" in TEMPLATES["zh-words"](["看看"])[0]
    assert "class=digit han" in TEMPLATES["zh-words"](["3月"])[0]
    rows = TEMPLATES["zh-characters"](list("王小明说：好好"))
    assert [("surname0" in row, "surname-1" in row, "surname-2" in row) for row in rows[:4]] == [
        (True, False, False),
        (False, True, False),
        (False, False, True),
        (False, False, False),
    ]
    assert {"c-1=王", "c0+1=小明", "classes=han|han|han"} <= {*rows[1]}
    assert "class=punctuation" in rows[4] and "same-1" in rows[6] and "same-1" not in rows[5]


def test_what_a_dictionary_says_of_words() -> None:
    row = TEMPLATES["zh-entities"](["在", "中国", "科学", "院", "工作"])[1]
    assert {"known=ns", "known+1=n", "joined=nt|0|3", "organisation+1", "w=中国"} <= {*row}
    row = TEMPLATES["zh-entities"](["克里斯特", "去", "東京"])[0]
    assert {"foreign=all", "known=-", "place+2"} >= {
        item for item in row if item.startswith(("foreign=", "known=", "pl"))
    }
    assert (
        "known=ns" in TEMPLATES["zh-entities"](["東京"])[0]
    )  # traditional characters are looked up as simplified ones
    assert "ends=n" in TEMPLATES["zh-entities"](["玛丽亚教堂"])[0]


def test_features_of_a_predicate() -> None:
    rows = TEMPLATES["roles"](["The", "car", "was", "[", "Sold", "]", ",", "then", "left"])
    assert {"v=sold", "far=-2", "path=<0", "<0|passive", "l=car"} <= {*rows[1]} and "far=0" in rows[4]
    assert {"far=2", "path=>1", "l-1=,"} <= {*rows[7]}
    assert "v=<>" in TEMPLATES["roles"](["no", "predicate"])[0]


def test_choice_of_template() -> None:
    assert choose_template([["2024", "!", "the"]]) == "en"
    assert choose_template([["数", "学", "2", "A"]]) == "zh-characters"
    assert choose_template([["数学", "很", "难", "Python"]]) == "zh-words"
    assert choose_template([["數學", "很", "難"]]) == "zh-words"
    assert choose_template([["...", "42"]]) == "en"


def test_real_sentences(shared_data: Path) -> None:
    """English parts of speech from 600 sentences, well above each word's commonest tag (0.74)."""
    text = (shared_data / "ud-en-ewt/en_ewt-ud-dev.conllu").read_text(encoding="utf-8")
    rows = [[line.split("\t") for line in block.splitlines() if line[:1].isdigit()] for block in text.split("\n\n")]
    data = [([r[1] for r in block], [r[3] for r in block]) for block in rows if block][:800]
    train, test = data[:600], data[600:]
    tagger = CRFTagger.train([s for s, _ in train], [t for _, t in train], max_iterations=40)
    found = tagger.predict([s for s, _ in test])
    pairs = [pair for (_, gold), tags in zip(test, found, strict=True) for pair in zip(gold, tags, strict=True)]
    assert np.mean([a == b for a, b in pairs]) > 0.8
