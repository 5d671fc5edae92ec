"""Linear classifiers: what they learn, how well their probabilities hold, what they save, what they refuse."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from hanmo.errors import DataError, ModelError, ResourceError, UsageError
from hanmo.folder import atomic_folder
from hanmo.models.calibration import Calibration, expected_calibration_error, fit_softmax, softmax
from hanmo.models.linear import LinearClassifier
from hanmo.models.linear_features import FeatureConfig, Vectorizer
from hanmo.models.linear_training import METHODS
from hanmo.text.segment import stop_words

TOPICS = {
    "food": ("soup rice noodles kitchen dinner", "米饭 面条 厨房 晚饭 汤"),
    "sport": ("match goal team player score", "比赛 进球 球队 球员 得分"),
    "weather": ("rain sun cloud wind storm", "下雨 太阳 云彩 大风 暴雨"),
}
FILLER = ("the of today with and was here", "的 了 今天 和 我们 是 在")


def corpus(number: int, language: str, noise: float = 0.2, seed: int = 0) -> tuple[list[str], list[str]]:
    """Texts whose topic words are sometimes those of another topic."""
    column, draw = ("en", "zh").index(language), random.Random(seed)
    texts, labels = [], []
    for _ in range(number):
        label = draw.choice(list(TOPICS))
        words = [draw.choice(FILLER[column].split()) for _ in range(3)]
        for _ in range(3):
            topic = draw.choice(list(TOPICS)) if draw.random() < noise else label
            words.append(draw.choice(TOPICS[topic][column].split()))
        draw.shuffle(words)
        texts.append((" " if language == "en" else "").join(words))
        labels.append(label)
    return texts, labels


def share_right(model: LinearClassifier, texts: list[str], labels: list[str]) -> float:
    return float(np.mean([a == b for a, b in zip(model.predict(texts), labels, strict=True)]))


# ---- learning ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("features", ["words", "characters", "both"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_both_languages(method: str, features: str, language: str) -> None:
    model = LinearClassifier(method, features).fit(*corpus(300, language))
    texts, labels = corpus(200, language, seed=1)
    probabilities = model.predict_proba(texts)
    assert share_right(model, texts, labels) > 0.85  # of three topics
    assert probabilities.shape == (200, 3) and model.labels == ("food", "sport", "weather")
    np.testing.assert_allclose(probabilities.sum(1), 1)
    assert [model.labels[column] for column in probabilities.argmax(1)] == model.predict(texts)


@pytest.mark.parametrize("calibration", ["sigmoid", "isotonic"])
@pytest.mark.parametrize("method", METHODS)
def test_probabilities_hold_on_unseen_texts(method: str, calibration: str) -> None:
    """A noisy task, in which no one can be certain."""
    model = LinearClassifier(method, "words", calibration=calibration, C=1.0).fit(*corpus(900, "en", noise=0.6))
    texts, labels = corpus(1500, "en", noise=0.6, seed=1)
    probabilities = model.predict_proba(texts)
    right = np.array([a == b for a, b in zip(model.predict(texts), labels, strict=True)], dtype=float)
    assert 0.5 < right.mean() < 0.9  # chance is a third
    assert expected_calibration_error(probabilities.max(1), right) < 0.06
    assert model.report["ece_after"] < 0.06


def test_calibration_repairs_scores_that_are_no_probabilities() -> None:
    """Distances of support vectors are far too timid; words that repeat each other make naive Bayes far too certain."""
    texts, labels = corpus(900, "en", noise=0.3)
    tests, gold = corpus(1500, "en", noise=0.3, seed=1)
    for method, repeats in (("svm", 1), ("naive-bayes", 4)):
        pieces = [
            [" ".join(f"{word}{i}" for word in text.split() for i in range(repeats)) for text in part]
            for part in (texts, tests)
        ]
        model = LinearClassifier(method, "words", C=0.1).fit(pieces[0], labels)
        errors = []
        for mapping in (Calibration("none", multi_label=False), model.calibration):
            shares = mapping.apply(model.scores(pieces[1]))
            right = np.array([model.labels[column] for column in shares.argmax(1)]) == np.array(gold)
            errors.append(expected_calibration_error(shares.max(1), right.astype(float)))
        assert errors[1] < 0.05 and errors[0] > 2 * errors[1]


def test_training_is_deterministic_and_the_batch_does_not_matter() -> None:
    texts, labels = corpus(150, "zh")
    for method in METHODS:
        first, second = (LinearClassifier(method).fit(texts, labels) for _ in range(2))
        together = first.predict_proba(texts)
        assert (together == second.predict_proba(texts)).all()
        assert (together[7:9] == first.predict_proba(texts[7:9])).all()


def test_penalty_chosen_by_cross_validation_is_reported() -> None:
    texts, labels = corpus(200, "en", noise=0.5)
    model = LinearClassifier("logistic", "words", C=None).fit(texts, labels)
    assert model.report["C"] in (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
    assert "cross-validation" in model.report["why"] and f"C={model.report['C']:g}" in model.report["why"]
    again = LinearClassifier("logistic", "words", C=model.report["C"]).fit(texts, labels)
    assert (again.predict_proba(texts) == model.predict_proba(texts)).all()


def test_balanced_classes_are_found_more_often() -> None:
    draw = random.Random(0)
    words = {"rare": ["alpha", "beta", "gamma", "delta"], "common": ["delta", "epsilon", "zeta", "eta"]}
    labels = ["rare" if index % 20 == 0 else "common" for index in range(400)]
    texts = [" ".join(draw.choice(words[label]) for _ in range(2)) for label in labels]
    for method in METHODS:
        plain, balanced = (
            LinearClassifier(method, "words", word_ngrams=(1, 1), balanced=value).fit(texts, labels)
            for value in (False, True)
        )
        # "delta" is a quarter of the words of both, so what remains is how often a label comes: 1 in 20, or as often
        shares = [model.predict_proba(["delta delta"])[0, model.labels.index("rare")] for model in (plain, balanced)]
        assert shares[0] < 0.1 and shares[1] > 3 * shares[0]
        assert balanced.report["ece_after"] < 0.1


def test_stop_words_are_left_out() -> None:
    texts, labels = ["the match", "the goal", "the rain", "the storm", "rain", "goal"], list("sswwws")
    names = LinearClassifier("logistic", "words", min_count=1, stop_words=stop_words("en")).fit(texts, labels)
    assert names.vectorizer.names == ["w:goal", "w:match", "w:rain", "w:storm"]
    chinese = LinearClassifier("logistic", "words", min_count=1, stop_words=stop_words("zh"), word_ngrams=(1, 1))
    chinese.fit(["我们的比赛", "下雨了", "比赛", "下雨"], list("swsw"))
    assert chinese.vectorizer.names == ["w:下雨", "w:比赛"]


def test_explanations_add_up() -> None:
    texts, labels = corpus(200, "zh")
    model = LinearClassifier("logistic", "words").fit(texts, labels)
    reasons = model.explain("今天下雨了，厨房的汤", "weather", top=3)
    assert reasons[0].feature == "下雨" and reasons[0].kind == "word" and len(reasons) <= 3
    assert [reason.value for reason in reasons] == sorted((reason.value for reason in reasons), reverse=True)
    assert model.explain("比赛比赛")[0].feature in ("比赛", "比赛 比赛")
    assert {r.kind for r in LinearClassifier("svm", "both").fit(texts, labels).explain("下雨", top=50)} == {
        "word",
        "character",
    }
    # all contributions of a label together with its bias are its score beyond the mean score of all labels
    features, values = model.vectorizer.vector(texts[0])
    scores = model.scores(texts[:1])[0]
    every = [model.explain(texts[0], label, top=10_000) for label in model.labels]
    positive = [sum(reason.value for reason in reasons) for reasons in every]
    weights = model.weights[features] - model.weights[features].mean(1, keepdims=True)
    np.testing.assert_allclose(positive, np.maximum(values[:, None] * weights, 0).sum(0), rtol=1e-6)
    centred = (values[:, None] * weights).sum(0) + model.bias - model.bias.mean()
    np.testing.assert_allclose(centred, scores - scores.mean(), rtol=1e-5, atol=1e-6)


def test_several_labels_at_once() -> None:
    first, second = corpus(300, "en", noise=0.0), corpus(300, "en", noise=0.0, seed=1)
    texts = [f"{a} {b}" for a, b in zip(first[0], second[0], strict=True)] + ["the of and", "here was today"]
    labels = [{a, b} for a, b in zip(first[1], second[1], strict=True)] + [set(), []]
    for method in METHODS:
        model = LinearClassifier(method, "words", word_ngrams=(1, 1), multi_label=True).fit(texts, labels)
        assert model.predict(["rain and soup", "a goal"]) == [["food", "weather"], ["sport"]]
        assert model.predict_proba(["rain and soup"]).sum() > 1.2  # not shares of one
        assert model.report["ece_after"] < 0.1


def test_few_texts_still_train() -> None:
    """Fewer examples than folds, and a label with a single one."""
    texts, labels = ["good film", "good fun", "bad film", "bad luck", "so so film"], ["+", "+", "-", "-", "?"]
    for method in METHODS:
        model = LinearClassifier(method, "words", min_count=1).fit(texts, labels)
        assert model.predict(texts) == labels
        assert np.isfinite(model.predict_proba(texts)).all()
    alone = LinearClassifier("logistic", "words", min_count=1).fit(["yes", "no"], ["1", "0"])
    assert alone.predict(["yes", "no"]) == ["1", "0"] and "too few" in alone.report["calibration"]


def test_unknown_and_empty_texts_get_the_shares_of_training() -> None:
    texts, labels = corpus(100, "en")
    texts, labels = texts + ["rain"] * 200, labels + ["weather"] * 200
    model = LinearClassifier("naive-bayes", "words").fit(texts, labels)
    for text in ("", "zzz qqq", "完全没有见过"):
        assert model.predict([text]) == ["weather"] and model.explain(text) == []
    assert model.predict_proba([]).shape == (0, 3)


# ---- features and calibration -----------------------------------------------------------------------------------


def test_tf_idf_by_hand() -> None:
    vectorizer = Vectorizer.fit(["a b", "a a c"], FeatureConfig("words", (1, 1), min_count=1))
    assert vectorizer.names == ["w:a", "w:b", "w:c"]
    a, rare = np.log(3 / 3) + 1, np.log(3 / 2) + 1
    rows, values = vectorizer.vector("A a c unknown")
    raw = np.array([(1 + np.log(2)) * a, rare])
    assert rows.tolist() == [0, 2]
    np.testing.assert_allclose(values, raw / np.sqrt((raw**2).sum()))


def test_tf_idf_equals_scikit_learn() -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer

    texts, _ = corpus(80, "en")
    ours = Vectorizer.fit(texts, FeatureConfig("words", (1, 2), min_count=2))
    theirs = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True, token_pattern=r"\S+")
    expected = theirs.fit_transform(texts)
    assert [name[2:] for name in ours.names] == theirs.get_feature_names_out().tolist()
    np.testing.assert_allclose(ours.weigh(ours.counts(texts)).toarray(), expected.toarray(), rtol=1e-12)


def test_held_out_texts_do_not_vote_on_features() -> None:
    """What a fold sees of the others is what a vectorizer fitted on them alone would see."""
    texts, _ = corpus(40, "zh")
    seen = np.arange(40) % 3 != 0
    for binary in (False, True):
        config = FeatureConfig("both", (1, 2), (1, 2), min_count=2, binary=binary)
        everything, part = (
            Vectorizer.fit(texts, config),
            Vectorizer.fit([t for t, s in zip(texts, seen, strict=True) if s], config),
        )
        assert len(part.names) < len(everything.names)
        found = everything.weigh_as_seen(everything.counts(texts), np.flatnonzero(seen))
        np.testing.assert_allclose(found.toarray(), part.weigh(part.counts(texts)).toarray(), rtol=1e-12)
        for row, text in enumerate(texts):
            rows, values = part.vector(text)
            np.testing.assert_allclose(found[row, rows].toarray()[0], values, rtol=1e-12)


@given(st.lists(st.text(st.sampled_from("ab 中文，\u3000\n")), min_size=1, max_size=6))
@settings(deadline=None)
def test_vectors_have_length_one_for_each_kind(texts: list[str]) -> None:
    vectorizer = Vectorizer.fit([*texts, "a 中"], FeatureConfig("both", (1, 2), (1, 3), min_count=1))
    for text in texts:
        rows, values = vectorizer.vector(text)
        assert (np.diff(rows) > 0).all()
        words = rows >= vectorizer.first_word
        for part in (values[words], values[~words]):
            assert part.size == 0 or np.square(part).sum() == pytest.approx(1)
        assert words.any() == bool(text.strip())


def test_scale_and_bias_of_a_known_distortion_are_found() -> None:
    generator = np.random.default_rng(0)
    true_scores = generator.normal(size=(20_000, 3))
    labels = (true_scores + generator.gumbel(size=true_scores.shape)).argmax(1)  # softmax(true_scores) by construction
    distorted = (true_scores - np.array([0.5, 0.0, -0.5])) * 7
    scale, bias = fit_softmax(distorted, np.eye(3)[labels], np.ones(len(labels)))
    assert scale == pytest.approx(1 / 7, rel=0.05)
    np.testing.assert_allclose(bias - bias.mean(), [0.5, 0.0, -0.5], atol=0.06)


def test_perfectly_separated_scores_stay_uncertain() -> None:
    """Platt's targets: ten right answers of ten are no reason to be certain of the eleventh."""
    scores = np.array([[5.0, -5.0]] * 10 + [[-5.0, 5.0]] * 10)
    targets = np.eye(2)[[0] * 10 + [1] * 10]
    mapping = Calibration.fit("sigmoid", scores, targets, np.ones(20), multi_label=False)
    assert mapping.apply(scores)[0, 0] == pytest.approx(11 / 12, abs=0.01)
    for method in ("sigmoid", "isotonic"):
        worthless = Calibration.fit(method, np.zeros((20, 2)), targets, np.ones(20), multi_label=False)
        np.testing.assert_allclose(worthless.apply(np.array([[3.0, 3.0]])), 0.5, atol=1e-3)


def test_extreme_scores_give_probabilities() -> None:
    scores = np.array([[1e300, -1e300], [-1e5, 1e5]])
    for multi_label in (False, True):
        shares = Calibration("none", multi_label).apply(scores)
        assert ((shares >= 0) & (shares <= 1)).all()
    assert softmax(np.array([[1e4, 1e4]])).tolist() == [[0.5, 0.5]]


def test_expected_calibration_error_by_hand() -> None:
    confidences, correct = np.array([0.95, 0.95, 0.65, 0.65, 1.0]), np.array([1, 0, 1, 0, 1])
    expected = (2 * abs(0.95 - 0.5) + 2 * abs(0.65 - 0.5) + 0) / 5
    assert expected_calibration_error(confidences, correct, bins=10) == pytest.approx(
        (abs(1.9 + 1.0 - 2) + abs(1.3 - 1)) / 5
    )
    assert expected_calibration_error(confidences[:4], correct[:4], bins=10) == pytest.approx(expected * 5 / 4)


# ---- on disk ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("calibration", ["sigmoid", "isotonic", "none"])
@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_saved_and_loaded_models_agree_bit_for_bit(tmp_path, method, multi_label, calibration) -> None:
    texts, labels = corpus(80, "zh")
    given_labels = [{label} for label in labels] if multi_label else labels
    options = {"multi_label": multi_label, "calibration": calibration, "stop_words": {"的"}}
    model = LinearClassifier(method, "both", **options).fit(texts, given_labels)
    model.save(tmp_path / "model")
    loaded = LinearClassifier.load(tmp_path / "model")
    probes = [*texts, "", "nothing known", "今天 SOUP"]
    assert (loaded.predict_proba(probes) == model.predict_proba(probes)).all()
    assert loaded.predict(probes) == model.predict(probes)
    assert loaded.explain(texts[0]) == model.explain(texts[0])
    assert loaded.describe() == model.describe()
    names = {path.name for path in (tmp_path / "model").iterdir()}
    assert names == {"config.json", "vocabulary.json", "model.safetensors", "hanmo.json"}
    loaded.save(tmp_path / "again")
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


@settings(deadline=None, max_examples=20)
@given(data=st.data(), method=st.sampled_from(METHODS), features=st.sampled_from(["words", "characters", "both"]))
def test_any_texts_survive_the_disk(tmp_path_factory, data, method: str, features: str) -> None:
    texts = data.draw(st.lists(st.text(min_size=1).filter(str.strip), min_size=4, max_size=8))  # lone surrogates too
    labels = [f"标签{index % 2}" for index in range(len(texts))]
    folder = tmp_path_factory.mktemp("any") / "model"
    model = LinearClassifier(method, features, min_count=1, language="en")
    try:
        model.fit(texts, labels)
    except DataError as error:  # nothing but control characters
        assert "no feature" in error.what
        return
    model.save(folder)
    assert (LinearClassifier.load(folder).predict_proba(texts) == model.predict_proba(texts)).all()


def test_a_loaded_model_needs_no_scikit_learn_or_scipy(tmp_path: Path) -> None:
    model = LinearClassifier("svm", "both", calibration="isotonic").fit(*corpus(80, "en"))
    model.save(tmp_path / "model")
    script = (
        "import sys; sys.modules.update({name: None for name in ('sklearn', 'scipy', 'jieba', 'torch')})\n"
        "from hanmo.models.linear import LinearClassifier; from pathlib import Path\n"
        f"print(LinearClassifier.load(Path({str(tmp_path / 'model')!r})).predict_proba(['rain and sun']).tolist())"
    )
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == model.predict_proba(["rain and sun"]).tolist()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    LinearClassifier("logistic", "words").fit(*corpus(60, "en")).save(folder)
    return folder


@pytest.mark.parametrize("name", ["config.json", "vocabulary.json", "model.safetensors"])
def test_truncated_altered_and_missing_files_are_refused(saved: Path, tmp_path: Path, name: str) -> None:
    content = (saved / name).read_bytes()
    for damage in (content[:-10], content[:20] + b"?" + content[21:], None):
        folder = tmp_path / "copy"
        folder.mkdir(exist_ok=True)
        for path in saved.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        (folder / name).unlink() if damage is None else (folder / name).write_bytes(damage)
        with pytest.raises(ModelError, match=r"bytes, its manifest|SHA-256|missing"):
            LinearClassifier.load(folder)


CONFIG_DAMAGE = {
    "another kind of model": lambda c: c | {"model_type": "crf"},
    "no labels": lambda c: c | {"labels": []},
    "labels twice": lambda c: c | {"labels": ["food", "food", "sport"]},
    "labels that are numbers": lambda c: c | {"labels": [1, 2, 3]},
    "one label less": lambda c: c | {"labels": ["food", "sport"]},
    "an unknown setting": lambda c: c | {"training": c["training"] | {"code": "x"}},
    "an unknown method": lambda c: c | {"training": c["training"] | {"method": "forest"}},
    "no settings": lambda c: {key: value for key, value in c.items() if key != "training"},
    "endless n-grams": lambda c: c | {"features": c["features"] | {"word_ngrams": [1, 10**12]}},
    "a number for a word": lambda c: c | {"features": c["features"] | {"language": 7}},
    "another calibration": lambda c: c | {"calibration": "isotonic"},
    "no object": lambda c: [c],
}
TENSOR_DAMAGE = {
    "no weights": lambda t: {key: value for key, value in t.items() if key != "weights"},
    "a row too few": lambda t: t | {"weights": t["weights"][:-1]},
    "another type": lambda t: t | {"weights": t["weights"].astype(np.float64)},
    "NaN": lambda t: t | {"bias": t["bias"] * np.nan},
    "an idf too few": lambda t: t | {"idf": t["idf"][1:]},
    "a bias too few in the calibration": lambda t: t | {"calibration.bias": t["calibration.bias"][1:]},
    "an unknown tensor": lambda t: t | {"calibration.more": np.zeros(3)},
    "infinite scale": lambda t: t | {"calibration.scale": t["calibration.scale"] + np.inf},
}


@pytest.mark.parametrize("case", [*CONFIG_DAMAGE, *TENSOR_DAMAGE, "vocabulary"])
def test_well_sealed_nonsense_is_refused(saved: Path, tmp_path: Path, case: str) -> None:
    config, tensors = json.loads((saved / "config.json").read_text()), load_file(saved / "model.safetensors")
    names = json.loads((saved / "vocabulary.json").read_text())
    with atomic_folder(tmp_path / "model") as folder:
        (folder / "config.json").write_text(json.dumps(CONFIG_DAMAGE.get(case, lambda c: c)(config)))
        save_file(TENSOR_DAMAGE.get(case, lambda t: t)(tensors), folder / "model.safetensors")
        (folder / "vocabulary.json").write_text(json.dumps(["w:the"] * len(names) if case == "vocabulary" else names))
    with pytest.raises(ModelError, match="not sound") as caught:
        LinearClassifier.load(tmp_path / "model")
    assert caught.value.zh and str(tmp_path) in caught.value.where


# ---- bad input --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "labels", "message", "where"),
    [
        (["a b", "a c"], ["x"], "2 texts and 1 labels", ""),
        (["a b", " \n"], ["x", "y"], "empty", "record 2"),
        (["a b", None], ["x", "y"], "empty", "record 2"),
        (["a b", "a c"], ["x", "x"], "same label 'x'", ""),
        ([], [], "no labels", ""),
        (["a b", "a c"], ["x", 1], "label is 1", "record 2"),
        (["a b", "a c"], ["", "x"], "label is ''", "record 1"),
        (["a b", "a c"], ["x", None], "label is None", "record 2"),
    ],
)
def test_records_that_cannot_be_learned_from(texts, labels, message: str, where: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        LinearClassifier().fit(texts, labels)
    assert caught.value.where == where and caught.value.zh


def test_multi_label_takes_collections() -> None:
    with pytest.raises(DataError, match="collection of strings") as caught:
        LinearClassifier(multi_label=True).fit(["a b", "a c"], [["x"], "y"])
    assert caught.value.where == "record 2"


def test_nothing_left_to_learn_from() -> None:
    for options in ({"min_count": 3}, {"stop_words": stop_words("en"), "min_count": 1}):
        with pytest.raises(DataError, match="no feature is left") as caught:
            LinearClassifier("logistic", "words", **options).fit(["the of", "of the"], ["x", "y"])
        assert "min_count" in caught.value.fix and caught.value.zh


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"method": "logistics"}, "logistic"),
        ({"features": "word"}, "words"),
        ({"calibration": "platt"}, "sigmoid"),
        ({"language": "fr"}, "zh"),
        ({"C": 0.0}, ""),
        ({"alpha": float("nan")}, ""),
        ({"min_count": 0}, ""),
        ({"word_ngrams": (2, 1)}, "(1, 2)"),
        ({"character_ngrams": (0, 3)}, "(1, 2)"),
        ({"balance": True}, "balanced"),
    ],
)
def test_settings_that_mean_nothing(options: dict, hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        LinearClassifier(**options)
    assert hint in caught.value.fix and caught.value.zh


def test_wrong_use_is_explained(saved: Path) -> None:
    for call in (lambda m: m.predict(["x"]), lambda m: m.explain("x"), lambda m: m.save(saved / "x")):
        with pytest.raises(ModelError, match="has not been trained"):
            call(LinearClassifier())
    model = LinearClassifier.load(saved)
    with pytest.raises(UsageError, match="unknown label 'foods'") as caught:
        model.explain("soup", "foods")
    assert "food" in caught.value.fix
    with pytest.raises(UsageError, match="not one string"):
        model.predict("soup")


def test_missing_scikit_learn_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ResourceError, match="scikit-learn") as caught:
        LinearClassifier().fit(["a b", "a c"], ["x", "y"])
    assert "hanmo[classical]" in caught.value.fix


def test_real_texts(shared_data: Path) -> None:
    """English spam and Chinese paper titles, a part of each: far above the majority label (0.86 and 0.44)."""
    lines = (shared_data / "sms-spam/sms.tsv").read_text(encoding="utf-8").splitlines()[:1500]
    pairs = [line.split("\t", 1)[::-1] for line in lines]
    titles = (shared_data / "csl/cls_ctg/train.tsv").read_text(encoding="utf-8").splitlines()[:2000]
    for rows, least in ((pairs, 0.95), ([line.split("\t")[1:3] for line in titles], 0.55)):
        train, test = [row for i, row in enumerate(rows) if i % 4], rows[::4]
        model = LinearClassifier("logistic", "words").fit([row[0] for row in train], [row[1] for row in train])
        assert share_right(model, [row[0] for row in test], [row[1] for row in test]) > least


def test_nb_logistic_is_the_sum_of_both() -> None:
    from sklearn.naive_bayes import ComplementNB

    texts, labels = corpus(120, "zh")
    both, alone = (LinearClassifier(method, "words").fit(texts, labels) for method in ("nb-logistic", "logistic"))
    matrix = both.vectorizer.weigh(both.vectorizer.counts(texts))
    bayes = ComplementNB(alpha=0.1).fit(matrix, labels).predict_joint_log_proba(matrix)
    expected = alone.scores(texts) + bayes - bayes.mean(1, keepdims=True)
    np.testing.assert_allclose(both.scores(texts), expected, atol=1e-4)
